"""Generation: token ids in, token ids out. This room knows no text."""
