"""Retrieval of visual neighbours: embeddings, nearest neighbours and near-duplicates."""
