"""What comes out of the two algorithms: a factorized model and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import nn

from rankfold.artifact.manifest import library_versions
from rankfold.artifact.save import save_artifact
from rankfold.certificate.certify import Certificate
from rankfold.certificate.document import Document, files, make_document, with_report
from rankfold.certificate.opened import Opened
from rankfold.data.input_settings import InputSettings, joined
from rankfold.errors import InputError
from rankfold.integrations import transformers as hf
from rankfold.integrations.vision import NamedModel, make_named, parse_named
from rankfold.model.sizes import model_parameters
from rankfold.report.latency import Latency
from rankfold.report.model_card import CARD_FILE, model_card, public_name
from rankfold.report.page import page as html
from rankfold.report.report import report_of
from rankfold.report.seen import SEEN_FILE, Run, Seen, seen_by, seen_text
from rankfold.search.trial import Trial

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

    def save(
        self,
        folder: str | Path,
        *,
        tokenizer: Any = None,
        overwrite: bool = False,
        source: str | None = None,
        input_settings: InputSettings | None = None,
        page: bool = True,
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
            page: Whether ``report.html`` is written too.

        Raises:
            InputError: The folder can't be written, ``source`` makes another model, or
                ``input_settings`` contradicts what rankfold has read.
        """
        named = None if source is None else parse_named(source)
        if named is not None:
            self._check_made_by(named)
        report, document = self.report, self.document
        if input_settings is not None:
            found = InputSettings.from_dict(report["input_settings"])
            sources = ("the data that was read", found), ("input_settings=", input_settings)
            together = joined(sources)
            report = {**report, "input_settings": together.as_dict()}
            document = with_report(document, report)
        seen = self.seen.as_dict(tokenizer, report["input_settings"])
        return save_artifact(
            folder,
            self.model,
            report,
            tokenizer=tokenizer,
            overwrite=overwrite,
            files={
                **files(document),
                CARD_FILE: self._card(named),
                SEEN_FILE: seen_text(seen),
            },
            source=named,
            page=(lambda manifest: html(manifest, document, seen)) if page else None,
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
        of_transformers = hf.is_transformers_model(self.model)
        return model_card(
            self.report,
            library_versions(),
            type(self.model).__name__,
            of_transformers=of_transformers,
            original=hf.opened_as(self.model) if of_transformers else "",
            source=None if named is None else str(named),
        )


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


def _opened_as(model: nn.Module) -> dict[str, str]:
    """What the model card calls a model of transformers."""
    return {"name": public_name(hf.opened_as(model))} if hf.is_transformers_model(model) else {}


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
