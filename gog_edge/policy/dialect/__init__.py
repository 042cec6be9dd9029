"""Dialects: the formats in which checkpoint families write actions and read observations."""
