"""Training of the atlas encoder: crops, losses, measurements."""
