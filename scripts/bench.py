#!/usr/bin/env python
"""Measure trtpool beside what people use instead; `python scripts/bench.py --help` says how.

This file stays empty of imports: every process that the benchmark spawns imports it again.
"""

if __name__ == "__main__":
    from benchlib.cli import main

    main()
