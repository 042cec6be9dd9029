"""What the benchmarks share: machine cards and tables, resource measurements, a synthetic ZIM file."""
