"""A user's model as a set of matrices."""
