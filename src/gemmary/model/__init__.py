"""The transformer, as mathematics: it knows nothing of devices, files or tokenizers."""
