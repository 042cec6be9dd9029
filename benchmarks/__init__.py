"""Benchmarks: each bench_*.py is a command that prints a machine card, a table, and JSON in its last line."""
