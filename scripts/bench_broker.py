#!/usr/bin/env python
"""Measure what the broker's loop costs by itself; `python scripts/bench_broker.py --help` says how."""

if __name__ == "__main__":
    from benchlib.broker_cli import main

    main()
