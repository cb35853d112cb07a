"""Tensors in, tensors out: never a module, a hook or a file."""
