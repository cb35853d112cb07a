"""What comes out of the two algorithms: a factorized model and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, overload

from torch import nn

from rankfold.artifact.manifest import library_versions
from rankfold.artifact.save import save_artifact
from rankfold.certificate.certify import Certificate
from rankfold.certificate.document import Document, files, make_document, with_report
from rankfold.certificate.opened import Opened
from rankfold.certificate.shown import bound_words, rendered
from rankfold.certificate.signature import SigningKey, open_key
from rankfold.data.input_settings import InputSettings, joined
from rankfold.errors import InputError, visible
from rankfold.files.shards import USUAL_SIZE
from rankfold.integrations import transformers as hf
from rankfold.integrations.vision import NamedModel, make_named, parse_named
from rankfold.machine.offload import amount_of
from rankfold.model.sizes import model_parameters
from rankfold.report.card_metadata import license_of
from rankfold.report.latency import Latency
from rankfold.report.model_card import CARD_FILE, model_card, public_name
from rankfold.report.notebook import (
    layer_records,
    result_html,
    summary_lines,
    sweep_records,
    together_words,
)
from rankfold.report.page import page as html
from rankfold.report.plot import plot_result, plot_sweep
from rankfold.report.report import report_of
from rankfold.report.seen import SEEN_FILE, Run, Seen, seen_by, seen_text
from rankfold.search.trial import Trial
from rankfold.settings import SizeOf, check_size

MOST_SIZES = 50  # of a sweep

Algorithm: TypeAlias = Literal["lossless", "compact"]


@dataclass(frozen=True)
class Result:
    """A factorized model and what is known of it.

    Attributes:
        model: The factorized copy; the original is untouched.
        certificate: Verdict, upper bound, margin, confidence, number of examples.
        report: Everything else, as in ``rankfold.json``: sizes, losses, layers, settings.
        document: The certificate's file: what it was computed from, as ``rankfold verify`` reads.
        seen: What only the run could see: times, memory, the held-out examples that got worst.
    """

    model: nn.Module
    certificate: Certificate
    report: dict[str, Any]
    document: Document
    seen: Seen = field(default_factory=Seen, repr=False, compare=False)

    @property
    def latency(self) -> Latency | None:
        """Milliseconds of one call of original and result, at batch 1 and 8, as measured here."""
        return self.seen.latency

    @property
    def found(self) -> bool:
        """Whether the model is smaller than the original and its certificate holds."""
        return self.certificate.holds and self.ratio < 1

    @property
    def ratio(self) -> float:
        """Parameters kept / original, of the whole model."""
        return float(self.report["ratio"])

    @property
    def layers(self) -> list[dict[str, Any]]:
        """A flat record for each layer, which ``pandas.DataFrame`` takes."""
        return layer_records(self.report)

    def summary(self) -> str:
        """Sizes, verdict, data and layers in words, a line each."""
        lines = summary_lines(self.report, self._name, embedding_parameters(self))
        return "\n".join(lines)

    def plot(self) -> Any:
        """Size against loss, and what is kept of each layer: a figure of matplotlib.

        Raises:
            InputError: matplotlib isn't installed.
        """
        return plot_result(self.report)

    @property
    def _name(self) -> str:
        return self.document["models"].get("name") or type(self.model).__name__

    def __repr__(self) -> str:
        certificate = self.report["certificate"]
        return visible(
            f"<Result of {self.report['algorithm']}: {self._name} at {self.ratio:.1%} of its "
            f"parameters; {certificate['verdict']}, {bound_words(certificate)}>"
        )

    def _repr_html_(self) -> str:
        return result_html(self.report, self._name, embedding_parameters(self))

    def save(
        self,
        folder: str | Path,
        *,
        tokenizer: Any = None,
        overwrite: bool = False,
        source: str | None = None,
        input_settings: InputSettings | None = None,
        texts: Mapping[str, str] | None = None,
        sign: str | Path | SigningKey | None = None,
        page: bool = True,
        max_shard_size: str | int = USUAL_SIZE,
    ) -> Path:
        """Write the artifact; ``rankfold.load(folder)`` opens it.

        Args:
            folder: New or empty, or an artifact with ``overwrite``.
            tokenizer: Saved beside a transformers model.
            overwrite: Replace an artifact that stands there.
            source: What makes a model of timm or torchvision, with all options that it was made
                with: ``timm:resnet18,num_classes=10``. Then it opens without ``model=``.
            input_settings: How you made the model's inputs, where rankfold didn't: the commands
                then read data so.
            texts: Written beside, by file name.
            sign: A private Ed25519 key that signs the folder: a PEM file, or what
                ``rankfold.certificate.signature.open_key`` gives.
            page: Whether ``report.html`` is written too.
            max_shard_size: Most weights in a file, ``"5GB"``; more are written into several.

        Raises:
            InputError: The folder can't be written, ``source`` makes another model,
                ``input_settings`` contradicts what rankfold has read, or the key can't be used.
        """
        named = None if source is None else parse_named(source)
        if named is not None:
            self._check_made_by(named)
        report, document = self.report, self.document
        if input_settings is not None:
            found = InputSettings.from_dict(report["input_settings"])
            sources = ("the data that was read", found), ("input_settings=", input_settings)
            report = {**report, "input_settings": joined(sources).as_dict()}
            document = with_report(document, report)
        seen = self.seen.as_dict(tokenizer, report["input_settings"])
        return save_artifact(
            folder,
            self.model,
            report,
            tokenizer=tokenizer,
            overwrite=overwrite,
            files={
                **(texts or {}),
                **files(document),
                CARD_FILE: self._card(named),
                SEEN_FILE: seen_text(seen),
            },
            source=named,
            key=open_key(sign) if isinstance(sign, str | Path) else sign,
            page=(lambda manifest: html(manifest, document, seen)) if page else None,
            max_shard_size=amount_of("max_shard_size", max_shard_size),
        )

    def _check_made_by(self, named: NamedModel) -> None:
        made = make_named(named)
        stated = self.report["original"]["parameters"]
        found = model_parameters(made)
        if type(made) is not type(self.model) or found != stated:
            raise InputError(
                f"source {named} makes a {type(made).__name__} of {found} parameters; the original "
                f"was a {type(self.model).__name__} of {stated}. Name all options that it was made "
                "with."
            )

    def _card(self, named: NamedModel | None) -> str:
        models = self.document["models"]
        return model_card(
            self.report,
            library_versions(),
            type(self.model).__name__,
            of_transformers=hf.is_transformers_model(self.model),
            original=models.get("name") or "",
            source=None if named is None else str(named),
            license=models.get("license") or "",
            sentences=models.get("sentences") is True,
        )


class Sweep(Sequence[Result]):
    """Results of several sizes that were tested on one held-out part, as they were asked for."""

    def __init__(self, results: Sequence[Result]) -> None:
        """Of one ``Preparation``."""
        self._results = tuple(results)

    @overload
    def __getitem__(self, place: int) -> Result: ...

    @overload
    def __getitem__(self, place: slice) -> Sweep: ...

    def __getitem__(self, place: int | slice) -> Result | Sweep:
        found = self._results[place]
        return Sweep(found) if isinstance(found, tuple) else found

    def __len__(self) -> int:
        return len(self._results)

    @property
    def records(self) -> list[dict[str, Any]]:
        """A flat record for each size, which ``pandas.DataFrame`` takes."""
        return sweep_records([result.report for result in self])

    def summary(self) -> str:
        """A line for each size, and how sure all of them are together."""
        lines = [
            f"{one['asked']:g} asked, {one['size']:.1%} of the parameters: {one['verdict']}, "
            f"{bound_words(result.report['certificate'])}"
            for one, result in zip(self.records, self, strict=True)
        ]
        return "\n".join([*lines, together_words([result.report for result in self])])

    def plot(self) -> Any:
        """Size against held-out loss: a figure of matplotlib; errors as of ``Result.plot``."""
        return plot_sweep([result.report for result in self])

    def __repr__(self) -> str:
        sizes = ", ".join(f"{one['size']:.1%} {one['verdict']}" for one in self.records)
        return f"<Sweep of {len(self)} sizes: {sizes}>"

    def _repr_html_(self) -> str:
        note = together_words([result.report for result in self])
        return rendered("sweep", records=self.records, note=note)


def check_sizes(sizes: object, size_of: SizeOf) -> list[float]:
    """Sizes as numbers, before anything is opened.

    Raises:
        InputError: There is none, or one is none or stands twice.
    """
    if isinstance(sizes, str) or not isinstance(sizes, Sequence) or not sizes:
        raise InputError(f"sizes is {sizes!r}; expected a list of shares, such as [0.95, 0.9].")
    found = [float(check_size(size, size_of)) for size in sizes]
    twice = next((size for size in found if found.count(size) > 1), None)
    if twice is not None or len(found) > MOST_SIZES:
        told = f"names {twice:g} twice" if twice is not None else f"has {len(found)} sizes"
        raise InputError(f"sizes {told}; expected up to {MOST_SIZES} different ones.")
    return found


def embedding_parameters(result: Result) -> tuple[int, int] | None:
    """Parameters of the embedding tables, before and after; None where the model has none."""
    tables = {
        id(module.weight): module.weight.numel()
        for module in result.model.modules()
        if isinstance(module, nn.Embedding)
    }
    whole = sum(tables.values())
    factorized = [
        layer for layer in result.report["layers"] if "uses" in layer and layer["rank"] is not None
    ]
    before = whole + sum(layer["parameters"] for layer in factorized)
    after = whole + sum(layer["factorized_parameters"] for layer in factorized)
    return (before, after) if before else None


def result_of(
    algorithm: Algorithm,
    chosen: Trial,
    opened: Opened,
    target: Mapping[str, Any],
    tried: Sequence[Trial],
    run: Run,
    order: Sequence[Trial] = (),
) -> Result:
    """The result of a plan that the held-out part was opened for.

    Args:
        algorithm: Which one chose it.
        chosen: The plan that stands.
        opened: What the held-out part says of it.
        target: What was asked for, for the report.
        tried: All plans that selection data saw.
        run: Whose watch says what each stage took.
        order: Those that were tested, where several were.
    """
    tested = opened.standing
    report = report_of(algorithm, chosen, opened, target, tried)
    document = make_document(
        tested.certificate,
        tested.statement,
        tested.evidence,
        private=chosen.round.settings.private,
        models={
            "class": f"{type(tested.model).__module__}.{type(tested.model).__qualname__}",
            "original": opened.original,
            "factorized": tested.digest,
            **_opened_as(tested.model),
        },
        data={
            "parts": report["data"],
            "look_alikes": [asdict(pair) for pair in opened.look_alikes],
            "history": asdict(opened.history),
        },
        run={
            "algorithm": algorithm,
            "ratio": report["ratio"],
            "task": report["task"],
            "plan": {
                name: {"rank": c.rank, "second_rank": c.second_rank, "form": c.form}
                for name, c in chosen.plan.items()
            },
            "order": _order_report(order, opened) if "certified" in target else [],
            "settings": report["settings"],
            "versions": library_versions(),
        },
        report=report,
    )
    seen = seen_by(run.watch, chosen, opened)
    return Result(tested.model, tested.certificate, report, document, seen)


def _opened_as(model: nn.Module) -> dict[str, Any]:
    """What the model card says of a model of transformers: its name, license, and kind."""
    if not hf.is_transformers_model(model):
        return {}
    found = {
        "name": public_name(hf.opened_as(model)),
        "license": license_of(hf.source_folder(model)),
        "sentences": hf.sentences_of(model) is not None,
    }
    return {key: value for key, value in found.items() if value}


def _order_report(order: Sequence[Trial], opened: Opened) -> list[dict[str, Any]]:
    """What each plan of a fixed sequence got; those after the first that fails were not tested."""
    return [
        {
            "ratio": trial.size,
            "upper_bound": one and one.certificate.upper_bound,
            "verdict": one and one.certificate.verdict,
            "model": one and one.digest,
        }
        for trial, one in zip(order, opened.tested, strict=True)
    ]
