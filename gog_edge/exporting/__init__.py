"""Checkpoint to graphs to engines (extra: export). Never imported at run time."""
