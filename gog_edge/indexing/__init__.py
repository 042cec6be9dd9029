"""Snapshots to packs (extra: index). Never imported at run time."""
