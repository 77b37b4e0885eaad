"""Floor 3: state, step, optimizer, checkpoints and the loop."""
