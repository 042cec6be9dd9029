"""Engines that run the same model shape with the same weights, each in its own process, and their comparison."""
