"""A user's data as three disjoint parts of examples."""
