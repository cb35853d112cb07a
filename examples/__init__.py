"""One runnable script for each kind of model; `python -m examples.NAME`, a few minutes at most."""
