"""Dialects: how the text of a policy maps to actions, and how observations are written for it."""
