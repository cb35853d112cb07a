"""Passes over calibration data under hooks, and what they keep of each layer."""
