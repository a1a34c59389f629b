"""Learning: a stage is a loss and a stream of batches; `fit` runs it."""
