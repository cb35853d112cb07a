"""One product of two factors."""
