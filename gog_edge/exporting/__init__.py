"""Export of checkpoints to graphs and engines (extra: export). The runtime imports nothing from here."""
