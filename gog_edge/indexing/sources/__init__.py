"""Readers of snapshots: each turns one file format into records that a pack is built from."""
