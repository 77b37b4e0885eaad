"""Floor 3: the card, the pictures and the page of a run."""
