"""Benchmarks that run us and a peer interleaved on the same cores."""
