"""What a run says of itself, for machines and people."""
