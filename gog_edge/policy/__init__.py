"""The policy: a multimodal model in a live session, its dialects, and the ways to run it."""
