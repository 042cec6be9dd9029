"""Commands that turn checkpoints into what a box runs."""
