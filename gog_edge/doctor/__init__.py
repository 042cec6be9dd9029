"""Diagnosis: what this machine has, what a bundle needs, and the command that installs what is missing."""
