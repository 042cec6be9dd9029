"""Renders the templates that carry numbers, units, dates, foreign words and signs."""
