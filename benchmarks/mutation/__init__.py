"""Structural mutation of every file that the product reads: the command is `python -m benchmarks.mutation`."""
