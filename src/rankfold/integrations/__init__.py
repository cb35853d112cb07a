"""Adapters to other libraries: one file each, each optional, none imported by the core."""
