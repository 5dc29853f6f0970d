"""Benchmarks against other libraries: `pytest benchmarks/ --benchmark-only`."""
