"""The parts of `scripts/bench.py`, `bench_broker.py` and `bench_control.py`: for developers, never shipped.

::

    cli -> cases -> poolside, baselines, latency -> crew, workload
        -> report

    cli -> gpu_cli -> gpu_cases -> gpu_stage -> gpu_loops, gpu_today, gpu_pool -> gpu_raw, gpu_items, gpu_window
                   -> gpu_report -> gpu_results
                   -> gpu_watch

    cli -> sweep_cli -> sweep_run -> sweep, crew, gpu_items
        -> sweep_plot

    broker_cli -> broker_cost -> broker_rig, which is `scripts/bench_broker.py`

    control_cli -> control -> sweep_run, which is `scripts/bench_control.py`

Rules that every case keeps:

* All contenders of a case are up at once, idle ones cost nothing, and they take turns: one
  window each a round, in alternating order.  Ratios are paired within a round, so that a
  slow minute of the machine hits both sides.
* Processes, memory and models are set up, and every contender has run, before the first window.
* A producer writes each input and checks each result.  A window ends when everything that was
  sent in it has come back; that time is counted.
* CPU seconds are those of all processes of a contender, from ``/proc/PID/stat``.

A sweep is of the pool alone: one pool and its producers at a time, and each group of points has a base of its own.

With ``--gpu`` each contender lives in a process of its own, and a window lies between two marks with work before and
after it, see `gpu_window`: what is compared there differs by 1 %, and not by 2 times.
"""
