"""The address of an endpoint, without what asks it."""

from __future__ import annotations

TIMEOUT = 120.0  # seconds that one answer may take


def is_url(spec: str) -> bool:
    """Whether a model is named by the address of an endpoint."""
    return spec.startswith(("http://", "https://"))
