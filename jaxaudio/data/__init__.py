"""Floor 0: the NumPy side; nothing here imports JAX."""
