#!/usr/bin/env python
"""Count what an item costs each process of a pool; `python scripts/bench_control.py --help` says how."""

if __name__ == "__main__":
    from benchlib.control_cli import main

    main()
