"""The embedded default snapshot: flags and countries of the world, scenes and questions about them."""
