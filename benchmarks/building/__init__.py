"""What `bench_build` is made of: a snapshot to build from, and a watch over the building processes."""
