"""What every export shares: its mark, and the factorized modules that it replaces."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from rankfold.forms.embedding.modules import FactorizedUse
from rankfold.forms.layer import FactorizedLayer

EXPORT_FILE = "export.json"  # says what the folder is, and that it may be overwritten


def _factorized(model: nn.Module) -> dict[str, Any]:
    found = {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, FactorizedLayer | FactorizedUse)
    }
    # The matrix of a conv in blocks is a part of it.
    return {name: m for name, m in found.items() if name.rpartition(".")[0] not in found}


def _write_json(file: Path, value: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
