"""Side by side with what else there is: `pytest benchmarks/ --benchmark-only`."""
