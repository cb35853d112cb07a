"""The folder that a factorized model is saved in."""
