"""Pairs pipeline, `python -m realign.pairs`: makes preference pairs of images and responses."""
