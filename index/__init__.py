"""Commands that build packs."""
