"""Everything about one way to write a matrix."""
