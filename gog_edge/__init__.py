"""Glance-or-Gaze on a box that is never online."""

__version__ = "0.1.0"
