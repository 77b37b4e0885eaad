"""Floor 2: one paper, one file, one frozen config."""
