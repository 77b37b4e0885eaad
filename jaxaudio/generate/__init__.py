"""Floor 3: decoding."""
