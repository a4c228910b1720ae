"""The parts of `scripts/bench.py`: for developers, never shipped.

::

    cli -> cases -> poolside, baselines, latency -> crew, workload
        -> report

Rules that every case keeps:

* All contenders of a case are up at once, idle ones cost nothing, and they take turns: one
  window each a round, in alternating order.  Ratios are paired within a round, so that a
  slow minute of the machine hits both sides.
* Processes, memory and models are set up, and every contender has run, before the first window.
* A producer writes each input and checks each result.  A window ends when everything that was
  sent in it has come back; that time is counted.
* CPU seconds are those of all processes of a contender, from ``/proc/PID/stat``.
"""
