"""The multimodal policy: what it sees, says and remembers."""
