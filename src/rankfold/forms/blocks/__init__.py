"""Two blocks, each with a rank of its own."""
