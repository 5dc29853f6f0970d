"""Filters: the completions that may become rejected responses."""
