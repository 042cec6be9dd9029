"""Training and evaluation of the atlas encoder, an open_clip model of a small configuration (model.json)."""
