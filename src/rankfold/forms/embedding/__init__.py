"""Low rank for all uses of one embedding matrix."""
