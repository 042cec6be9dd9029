"""Modules of the checkout that run the commands of `gog-edge export` under their older names."""
