"""What the commands print with ``--json``: each field and its type, from which schemas are made.

An output may have fields beside those that are described.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from rankfold.artifact.schema import ReportFields, RunFields
from rankfold.certificate.schema import HistoryFields, NotNegative, Share, StatedFields
from rankfold.cli.facts import Facts
from rankfold.files.checked import Count, Digest, Fields, Number, Word


class RunOutput(RunFields, kw_only=True):
    """Of ``lossless`` and ``compact``; ``saved`` is None where nothing was saved.

    ``history`` counts earlier certificates of other models on the same held-out examples: the best
    of several is falsely lossless more often than one.
    """

    history: HistoryFields
    saved: str | None


class MeanLoss(Fields):
    """A mean loss."""

    unit: Word
    mean: Number
    standard_error: NotNegative


class EvaluateOutput(Fields):
    """Of ``evaluate``."""

    model: str
    data: str
    task: Word
    examples: Count
    sources: list[dict[str, Any]]
    left_out: dict[str, Count | None]
    columns_left_out: list[str]
    loss: MeanLoss
    accuracy: Share | None
    data_digest: Digest


class CheckFields(Fields):
    """One thing that ``verify`` compared."""

    what: str
    outcome: Literal["agrees", "differs", "not checked"]
    detail: str


class VerifyOutput(Fields):
    """Of ``verify``; ``certificate`` is None where it could not be computed again."""

    model: str
    data: str
    agrees: bool
    checks: list[CheckFields]
    certificate: StatedFields | None


class ExportOutput(Fields):
    """Of ``export``."""

    folder: str
    to: str
    parameters: Count
    bytes: Count
    factorized_parameters: Count
    factorized_bytes: Count
    difference: NotNegative | None
    dynamic: list[str]


class ErrorFields(Fields):
    """Why there is no result; ``traceback`` is of the user's own code, where that raised it."""

    code: Count
    kind: Literal["bad input", "own code", "interrupted"]
    message: str
    traceback: str


class ErrorOutput(Fields):
    """Of every command, in place of a result."""

    error: ErrorFields


OUTPUTS: dict[str, type[msgspec.Struct]] = {
    "lossless": RunOutput,
    "compact": RunOutput,
    "inspect": ReportFields,
    "evaluate": EvaluateOutput,
    "verify": VerifyOutput,
    "export": ExportOutput,
    "doctor": Facts,
    "error": ErrorOutput,
}


def schema_of(name: str) -> dict[str, Any]:
    """The JSON schema of an output, draft 2020-12."""
    made = msgspec.json.schema(OUTPUTS[name])
    draft = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": draft, "title": f"rankfold {name}", **made}
