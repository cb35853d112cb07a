"""Recompute what an artifact says of itself."""

from rankfold.verify.checks import Check, Verification, verification_lines
from rankfold.verify.verify import verify

__all__ = ["Check", "Verification", "verification_lines", "verify"]
