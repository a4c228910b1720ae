#!/usr/bin/env python
"""Measure trtpool beside its peers, on the same work; `python scripts/bench_peers.py --help` says how.

This file stays empty of imports: every process that the benchmark spawns imports it again.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    # The two benchmarks share code, which they find as scripts.benchlib and scripts.peerlib.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from scripts.peerlib.cli import main

    main()
