"""What benchmarks make of a model's answers: pure functions from texts to figures."""
