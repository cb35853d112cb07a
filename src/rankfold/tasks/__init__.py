"""What a loss is, and the losses of a model on examples."""
