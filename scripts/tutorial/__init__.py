"""The programs of docs/tutorial.md, one for each step, and `measure`, which runs all of them and compares."""
