"""Floor 1: Flax Linen modules used by two or more models."""
