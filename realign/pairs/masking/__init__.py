"""Masking: the parts of a response that infill writes again."""
