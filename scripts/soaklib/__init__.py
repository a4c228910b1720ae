"""What `scripts/soak.py` is made of.

::

    cli        options, the loop over time, the summary
    plan       what a seed says: the pool, the producers one after another, the faults one after another
    target     the pool under test: its processes, its figures, and what may be left of it
    faults     signals to workers, producers, broker
    crew       producer processes, as the parent sees them
    producer   a producer process: ``python -m soaklib.producer``
    ledger     what became of each item
    models     model files, and the hook by which an input kills or hangs a worker

The seed decides who does what, and in which order; when that meets what, the machine decides.
"""
