"""Floor 3: weights in and out."""
