"""Untrusted files in, atomic folders out."""
