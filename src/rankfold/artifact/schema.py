"""What stands in ``rankfold.json`` beside what rebuilds the layers: each field and its type.

Fields with a default are those that earlier versions did not write.
"""

from __future__ import annotations

from typing import Any

import msgspec

from rankfold.certificate.schema import (
    CertificateFields,
    GuardFields,
    NotNegative,
    PartFields,
    SettingFields,
    Share,
    check_parts,
)
from rankfold.files.checked import Count, Fields, Number, Rank, Word


class SizeFields(Fields):
    """Sizes of a model."""

    parameters: Count
    factorizable_parameters: Count
    bytes: Count
    flops: Count


class LossFields(Fields):
    """Losses on held-out data."""

    unit: Word
    original: Number
    factorized: Number
    change: Number
    standard_error: NotNegative
    predicted_change: Number | None
    control_change: Number | None
    control: Number | None = None
    original_standard_error: Number | None = None
    factorized_standard_error: Number | None = None
    control_standard_error: Number | None = None
    control_change_standard_error: Number | None = None


class AccuracyFields(Fields):
    """Accuracy of both models, where the task has one."""

    original: Share | None
    factorized: Share | None

    def __post_init__(self) -> None:
        """Both models have one, or none."""
        if (self.original is None) != (self.factorized is None):
            raise ValueError("expected both accuracies, or none")


class AllocationFields(Fields):
    """How far the plan may be from the best one."""

    predicted_cost: Number
    gap: NotNegative


class RefitFields(Fields):
    """Which layers were fitted again."""

    layers: list[str]
    residual: list[str]
    examples: Count
    gain: Number | None


class RangeFields(Fields):
    """The harmless range of a layer."""

    radius: Number
    lossless_rank: Count
    signal: Number
    noise: Number


class LayerFields(Fields):
    """One layer."""

    name: str
    kind: str
    shape: list[Count]
    rank: Rank | None
    full_rank: Count
    form: Word | None
    parameters: Rank
    factorized_parameters: Count
    flops: Count
    factorized_flops: Count
    predicted_change: Number | None
    predicted_by_rank: list[tuple[Number, Number]] | None
    second_rank: Rank | None = None
    pivoted: bool | None = None
    reason_dense: Word | None = None
    interaction_factor: Number | None = None
    whole_grams: Word | None = None
    grams_lack: dict[str, Number] | None = None
    harmless_range: RangeFields | None = None


class LeftFields(Fields):
    """A layer that can't be factorized."""

    name: str
    kind: str
    reason: str


class EmbeddingFields(Fields):
    """How near the embeddings of a sentence encoder stay."""

    cosine: Number
    examples: Count
    neighbours: dict[str, Number]


class ModelFields(Fields):
    """What is said of the model itself."""

    class_: str = msgspec.field(name="class")


class RunFields(Fields):
    """What a run says of its result."""

    algorithm: Word
    target: dict[str, Any]
    task: Word
    agreement: bool
    settings: SettingFields
    original: SizeFields
    factorized: SizeFields
    ratio: Number
    loss: LossFields
    accuracy: AccuracyFields
    certificate: CertificateFields
    data: dict[str, PartFields]
    layers: list[LayerFields]
    not_factorized: list[LeftFields]
    allocation: AllocationFields | None = None
    refit: RefitFields | None = None
    guard: GuardFields | None = None
    embeddings_kept: EmbeddingFields | None = None
    left_out: dict[str, Count | None] = msgspec.field(default_factory=dict)
    columns_left_out: list[str] = msgspec.field(default_factory=list)
    selection: list[Any] = msgspec.field(default_factory=list)
    files: list[str] = msgspec.field(default_factory=list)

    def __post_init__(self) -> None:
        """The three parts are there."""
        check_parts(self.data)


class ReportFields(RunFields, kw_only=True):
    """The whole of ``rankfold.json`` that a person reads."""

    versions: dict[str, str]
    model: ModelFields
