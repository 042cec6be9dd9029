"""Commands that build packs: `python -m index.NAME` runs the same functions as `gog-edge pack`."""
