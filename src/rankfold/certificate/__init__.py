"""From held-out losses to a verdict, and the files that say it."""
