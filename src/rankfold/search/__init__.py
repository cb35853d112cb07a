"""Trying, measuring and choosing on calibration and selection data."""
