"""Embed what a segment added, and build the FAISS index of each vector space."""
