"""Retrieval from packs: encoder, vector and text search, fusion, and the registry of open packs."""
