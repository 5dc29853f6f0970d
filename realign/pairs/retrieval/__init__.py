"""Retrieval of visual neighbours: embeddings, nearest neighbours, near-duplicates."""
