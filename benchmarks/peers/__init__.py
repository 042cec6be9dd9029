"""Other engines on the same shape and weights, each in a process of its own."""
