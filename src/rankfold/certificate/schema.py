"""What stands in ``certificate.json``, and of it in ``rankfold.json``: each field and its type.

Fields with a default are those that earlier versions did not write.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from rankfold.files.checked import (
    Count,
    Digest,
    Fields,
    Number,
    Rank,
    ShortDigest,
    Whole,
    Word,
)

Verdict = Literal["better", "lossless", "not shown", "worse"]
Test = Literal["bounded", "t", "betting"]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
NotNegative = Annotated[float, msgspec.Meta(ge=0, le=1.7e308)]
Confidence = Annotated[float, msgspec.Meta(gt=0.5, lt=1)]
GuardDigest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]
Positive = Annotated[float, msgspec.Meta(gt=0, le=1.7e308)]


class MetricFields(Fields):
    """One metric of a certificate."""

    name: str
    original: Number
    factorized: Number
    upper_bound: Number
    margin: NotNegative | None
    verdict: Verdict | None
    lost: Number | UnsetType = UNSET
    lower_bound: Number | UnsetType = UNSET
    p_value: Share | None = None

    def __post_init__(self) -> None:
        """A margin and a verdict come together."""
        if (self.margin is None) != (self.verdict is None):
            raise ValueError("expected a verdict where there is a margin, and none elsewhere")


class CertificateFields(Fields):
    """A certificate as ``rankfold.json`` has it."""

    verdict: Verdict
    change: Number
    standard_error: NotNegative
    upper_bound: Number
    margin: NotNegative
    unit: Word
    confidence: Confidence
    examples: Rank
    lower_bound: Number | UnsetType = UNSET
    data_digest: str | UnsetType = UNSET
    method: Word | UnsetType = UNSET
    test: Test | UnsetType = UNSET
    units: Rank | UnsetType = UNSET
    t_upper_bound: Number | UnsetType = UNSET
    lowest: Number | None = None
    highest: Number | None = None
    range_from: Word | None = None
    above: Count | None = None
    share_above: Share | None = None
    needed: Count | None = None
    metrics: list[MetricFields] = msgspec.field(default_factory=list)
    guard: CertificateFields | None = None

    def __post_init__(self) -> None:
        """What a range goes with is there where a range is."""
        if self.highest is None:
            return
        beside = ("test", "units", "t_upper_bound", "lowest", "range_from", "above", "share_above")
        lacking = [name for name in beside if getattr(self, name) in (None, UNSET)]
        if lacking:
            raise ValueError(f"expected {', '.join(lacking)}, too, where highest is a number")


class StatedFields(CertificateFields):
    """A certificate as ``certificate.json`` has it: whole."""

    lower_bound: Number
    data_digest: Digest
    method: Word
    test: Test
    units: Rank
    t_upper_bound: Number
    lowest: Number | None
    highest: Number | None
    range_from: Word | None
    above: Count | None
    share_above: Share | None
    needed: Count | None
    metrics: list[MetricFields]


class StatementFields(Fields, forbid_unknown_fields=True):
    """What was stated before."""

    margin: NotNegative
    confidence: Confidence
    test: Test
    lowest: Number | None
    highest: Number | None
    range_from: Word | None
    expected: Number
    deviation: NotNegative
    metric_margins: dict[str, Number]


class PartFields(Fields):
    """Which examples of the user's are a part."""

    examples: Count
    digest: str
    given: Count | UnsetType = UNSET
    left_out: dict[str, Count | None] = msgspec.field(default_factory=dict)
    columns_left_out: list[str] = msgspec.field(default_factory=list)
    drawn_anew: bool = False
    source: str | None = None


class LookAlike(Fields):
    """Two images that look alike."""

    part: str
    example: Whole
    held_out: Whole


class HistoryFields(Fields):
    """Earlier openings."""

    kept: bool
    others: Count
    lossless: Count
    shared: Count
    trouble: str | None = None


def check_parts(parts: Collection[str]) -> None:
    """Refuse data without one of the three parts.

    Raises:
        ValueError: Names it.
    """
    for name in ("calibration", "selection", "held_out"):
        if name not in parts:
            raise ValueError(f"expected a part {name}")


class DataFields(Fields):
    """The parts of the data and their held-out examples."""

    parts: dict[str, PartFields]
    look_alikes: list[LookAlike]
    history: HistoryFields
    held_out_examples: list[ShortDigest]
    held_out_answers: list[ShortDigest]
    held_out_groups: list[str] | None

    def __post_init__(self) -> None:
        """The three parts are there."""
        check_parts(self.parts)


class ModelsFields(Fields):
    """Digests of both models."""

    original: Digest
    factorized: Digest
    class_: str = msgspec.field(name="class")
    name: str | None = None
    license: str | None = None
    sentences: bool = False


class Planned(Fields):
    """The choice of one layer."""

    rank: Rank | None
    second_rank: Rank | None = None
    form: Word | None = None


class Ordered(Fields):
    """One plan of a fixed sequence."""

    ratio: Number
    upper_bound: Number | None
    verdict: Verdict | None
    model: Digest | None

    def __post_init__(self) -> None:
        """What was tested has a bound."""
        if self.verdict is not None and self.upper_bound is None:
            raise ValueError("expected an upper_bound where there is a verdict")


class SettingFields(Fields):
    """Those of the settings that are read again."""

    objective: Word
    seed: Whole
    limit: Rank | None = None
    selection_limit: Rank | None = None
    held_out_limit: Rank | None = None
    confidence: Confidence | UnsetType = UNSET
    test: Test | UnsetType = UNSET
    largest_change: Positive | None = None
    accuracy_margin: Share | None = None
    guard_margin: NotNegative | None = None
    private: bool = False


class RunFields(Fields):
    """How the plan was found."""

    algorithm: Word
    ratio: Number
    task: Word
    plan: dict[str, Planned]
    order: list[Ordered]
    settings: SettingFields
    versions: dict[str, str]


class MetricValues(Fields):
    """Of both models, by example."""

    original: list[Share]
    factorized: list[Share]


class EvidenceFields(Fields):
    """Numbers of single examples."""

    terms: list[Positive]
    original_losses: list[Number]
    factorized_losses: list[Number]
    differences: list[Number]
    metrics: dict[str, MetricValues]
    original_correct: list[Number] | UnsetType = UNSET
    factorized_correct: list[Number] | UnsetType = UNSET

    def __post_init__(self) -> None:
        """There is one number an example, of two examples or more."""
        lists: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("original_losses", "factorized_losses", "differences")
        }
        for name, values in self.metrics.items():
            lists |= {f"{name}.original": values.original, f"{name}.factorized": values.factorized}
        correct = {n: getattr(self, n) for n in ("original_correct", "factorized_correct")}
        lists |= {name: found for name, found in correct.items() if found is not UNSET}
        for name, found in lists.items():
            if len(found) != len(self.terms):
                raise ValueError(
                    f"expected {len(self.terms)} numbers in {name}, as in terms, got {len(found)}"
                )
        if len(self.terms) < 2:
            raise ValueError(f"expected 2 examples or more, got {len(self.terms)}")
        if [*correct.values()].count(UNSET) == 1:
            raise ValueError("expected original_correct and factorized_correct, or none of them")


class GuardFields(Fields):
    """What a report says of examples of other kinds."""

    kind: Literal["own text", "given"] | None
    name: Literal["text of other kinds", "data of other kinds"]
    unit: Word
    missing: str | None = None
    seed: Whole | UnsetType = UNSET
    examples: Count | UnsetType = UNSET
    terms: Count | UnsetType = UNSET
    digest: str | UnsetType = UNSET
    given: Count | UnsetType = UNSET
    left_out: dict[str, Count | None] = msgspec.field(default_factory=dict)
    columns_left_out: list[str] = msgspec.field(default_factory=list)
    drawn_anew: bool = False
    source: str | None = None
    told: list[str] | UnsetType = UNSET
    original: Number | None = None
    factorized: Number | None = None
    change: Number | None = None
    standard_error: Number | None = None
    margin: NotNegative | None = None
    confidence: Confidence | UnsetType = UNSET
    upper_bound: Number | UnsetType = UNSET
    lower_bound: Number | UnsetType = UNSET
    verdict: Verdict | UnsetType = UNSET
    needed: Count | None = None

    def __post_init__(self) -> None:
        """What is said goes together."""
        wanted = ["seed", "examples", "terms", "told"]
        if self.kind is None:
            wanted = ["missing"]
        elif self.margin is not None:
            wanted += ["confidence", "upper_bound", "verdict"]
        lacking = [name for name in wanted if getattr(self, name) in (None, UNSET)]
        if lacking:
            raise ValueError(f"expected {', '.join(lacking)}, too")


class GuardEvidence(Fields):
    """Numbers of single examples of other kinds; None where they are not finite."""

    terms: list[Number | None]
    original_losses: list[Number | None]
    factorized_losses: list[Number | None]

    def __post_init__(self) -> None:
        """There is one number an example, of two examples or more."""
        lengths = {*map(len, (self.terms, self.original_losses, self.factorized_losses))}
        if len(lengths) > 1 or min(lengths) < 2:
            raise ValueError("expected as many terms as losses, 2 or more")


class StatedGuard(GuardFields):
    """What a certificate says of examples of other kinds."""

    digests: list[GuardDigest] | None = None
    texts: list[list[Count]] | None = None
    statement: StatementFields | None = None
    evidence: GuardEvidence | None = None

    def __post_init__(self) -> None:
        """What is said goes together."""
        super().__post_init__()
        if self.kind is not None and (self.digests is None or self.digest is UNSET):
            raise ValueError("expected digests and their digest, too")


class DocumentFields(Fields):
    """The whole of ``certificate.json``."""

    format_version: int
    certificate: StatedFields
    statement: StatementFields
    models: ModelsFields
    data: DataFields
    run: RunFields
    evidence: EvidenceFields | None
    evidence_digest: Digest
    digest: Digest
    guard: StatedGuard | None = None
    report: dict[str, Digest] = msgspec.field(default_factory=dict)


class SignedFile(Fields, forbid_unknown_fields=True):
    """One file that is signed."""

    bytes: Count
    sha256: Digest


class SignatureFields(Fields, forbid_unknown_fields=True):
    """The whole of ``certificate.sig.json``."""

    format_version: Rank
    algorithm: Literal["Ed25519"]
    key: Digest
    files: dict[str, SignedFile]
    signature: Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9+/]{86}==$")]
