"""The local snapshot: encoder, index, store, and what joins them."""
