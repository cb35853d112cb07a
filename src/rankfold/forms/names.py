"""The words for storages. Nothing here imports torch, which takes seconds."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

Storage: TypeAlias = Literal["pair", "pivoted"]

STORAGES: tuple[Storage, ...] = get_args(Storage)
