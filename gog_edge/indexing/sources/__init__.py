"""Readers of snapshots: one module a format, each a `Source`."""
