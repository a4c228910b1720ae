#!/usr/bin/env python
"""Run a pool under random load and random faults and check every item; `python scripts/soak.py --help` says how."""

if __name__ == "__main__":
    from soaklib.cli import main

    main()
