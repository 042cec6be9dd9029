"""Commands that train the atlas models."""
