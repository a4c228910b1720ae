"""The parts of `scripts/bench_peers.py`: for developers, never shipped.

::

    cli -> rounds -> host -> contestant -> processes, job
        |         -> results
        -> roster -> own, local, torch_queue, iceoryx, mosec, litserve, triton, ray_actors, ray_data
        -> report -> results

Rules that every measurement keeps:

* One contestant is up at a time, in a process of its own (the host) with all that it starts below it.  A round
  gives each of them its turn, in an order shuffled by a seed, and ratios are taken within a round: the machine's
  speed drifts.
* Every contestant does the same work on the same items (`benchlib.workload`), its producers check each answer, and one
  process computes.
* A window ends when everything that was sent in it has come back; that time is counted.  Servers, producers and
  models are up, and have run, before it begins.
* CPU seconds are those of every process below the host, see `processes`.  Daemons cannot leave it: the host adopts
  orphans.
* A contestant that leaves a process behind has failed.
"""
