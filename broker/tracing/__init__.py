"""`trtpool trace`: where the time of a pool that serves goes, as a Chrome trace.

::

    command                     supervisor                     broker
    asking: a memfd  --fd-->    traces: one at a time  --fd--> tracer: maps it, has a tap follow the ledger
       |                                                        tap: what is said is said there too  ---> records
       '--- reads the memfd when the trace is over: records -> telling -> story -> tracks -> chrome -> JSON

    records    what the broker writes, and the bounded memory that it writes it to
    tap        what stands between ledger and core while a trace runs, and nowhere at all otherwise
    tracer     the broker's side of a trace
    requests   what a command and the supervisor say to each other
    traces     the supervisor's side
    asking     the command's side
    telling    the story that the records tell
    story      what happened: slices of time, levels and arrows
    tracks     which slices are drawn beside each other, and where a device's phases lie
    chrome     all of it as JSON
    command    the command line
"""
