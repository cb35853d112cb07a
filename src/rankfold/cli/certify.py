"""``rankfold certify``: the paired test and its certificate for any two models."""

from __future__ import annotations

import sys
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from rankfold.certificate.document import JSON_FILE
from rankfold.certificate.signature import open_key, sign
from rankfold.certificate.statement import DEFAULT_MARGIN, TestName
from rankfold.cli.app import DIFFERS, DOES_NOT_HOLD, DONE, command, say, tell
from rankfold.cli.inputs import unchanged
from rankfold.cli.json_out import print_json
from rankfold.cli.named_paths import named_paths
from rankfold.cli.open_given import loss_sources, open_given, open_held_out, reader_of
from rankfold.cli.options import DATA_HELP, MODEL_HELP, OwnClass, Reading, Weights, margin_option
from rankfold.cli.setting_options import setting_option
from rankfold.errors import InputError, listed, visible
from rankfold.files.durable import write_whole
from rankfold.files.folder import check_output, folder_in_one_step, owned_output
from rankfold.given_models import GivenCertificate, certify_models, certify_samples
from rankfold.machine.device import check_device
from rankfold.machine.progress import TerminalProgress
from rankfold.others.by_byte import OfBytes
from rankfold.others.document import (
    BADGE_FILE,
    CARD_FILE,
    given_files,
    read_given,
    recomputed,
    verdict_words,
)
from rankfold.others.endpoint import TIMEOUT, is_url
from rankfold.others.samples import read_samples
from rankfold.settings import Settings

MODE = 0o644  # of the files written
_FILE = "Output"
GIVEN_HELP = (
    MODEL_HELP + " Also a folder that rankfold saved, a quantized folder, an .onnx file, or the "
    "address of an OpenAI-compatible endpoint: http://localhost:8000/v1."
)


@dataclass(frozen=True)
class Test:
    """What is claimed, and how it is tested."""

    margin: Annotated[float, margin_option("Certificate")] = DEFAULT_MARGIN
    confidence: Annotated[float, setting_option("confidence")] = Settings.confidence
    test: Annotated[TestName, setting_option("test")] = Settings.test
    largest_change: Annotated[float | None, setting_option("largest_change")] = None
    accuracy_margin: Annotated[float | None, setting_option("accuracy_margin")] = None
    held_out_limit: Annotated[
        int | None,
        typer.Option(
            help="Examples of --data used, drawn by --seed.",
            show_default="10000",
            rich_help_panel="Data",
        ),
    ] = None
    private: Annotated[bool, setting_option("private")] = False
    seed: Annotated[int, setting_option("seed")] = Settings.seed

    def settings(self) -> Settings:
        """The same as settings."""
        asked = {one.name: getattr(self, one.name) for one in fields(self)}
        return Settings(**{name: value for name, value in asked.items() if name != "margin"})


@dataclass(frozen=True)
class Outputs:
    """What is written."""

    out: Annotated[
        Path | None, typer.Option(help="Folder for the certificate.", rich_help_panel=_FILE)
    ] = None
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace an earlier certificate in --out.", rich_help_panel=_FILE
        ),
    ] = False
    badge: Annotated[
        Path | None, typer.Option(help="SVG file for a badge.", rich_help_panel=_FILE)
    ] = None
    card: Annotated[
        Path | None,
        typer.Option(help="File for the lines of a model card.", rich_help_panel=_FILE),
    ] = None
    sign: Annotated[
        Path | None,
        typer.Option(
            help="Private Ed25519 key that signs the folder --out.", rich_help_panel=_FILE
        ),
    ] = None

    def check(self, reads: list[Path]) -> None:
        """Refuse what can't be written, before any work is done.

        Raises:
            InputError: As said.
        """
        if self.sign is not None:
            if self.out is None:
                raise InputError("--sign signs the folder --out; give both, or none of them.")
            open_key(self.sign)
        if self.out is not None:
            check_output(self.out, self.overwrite, JSON_FILE, reads=reads)
        for name, file in (("--badge", self.badge), ("--card", self.card)):
            if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
                raise InputError(
                    f"{name} is {file}; expected the name of a file in a folder that is there."
                )

    def write(self, found: GivenCertificate) -> None:
        """Write all that was asked for.

        Raises:
            InputError: The system refuses something.
        """
        texts = given_files(found.document)
        if self.out is not None:
            with folder_in_one_step(self.out, self.overwrite) as draft:
                for name, text in texts.items():
                    (draft / name).write_text(text, encoding="utf-8")
            if self.sign is not None:
                sign(self.out, self.sign)
        for file, name in ((self.badge, BADGE_FILE), (self.card, CARD_FILE)):
            if file is not None:
                try:
                    write_whole(file, [texts[name].encode()], MODE)
                except OSError as error:
                    raise InputError(
                        f"{file} can't be written: {error}. Choose another."
                    ) from error


@dataclass(frozen=True)
class Served:
    """How an endpoint is asked."""

    endpoint_model: Annotated[
        str | None,
        typer.Option(
            help="Name of the model at the endpoint.",
            show_default="the one that it serves",
            rich_help_panel="Advanced",
        ),
    ] = None
    api_key_variable: Annotated[
        str,
        typer.Option(
            help="Variable of the environment with the endpoint's key.", rich_help_panel="Advanced"
        ),
    ] = "RANKFOLD_API_KEY"
    timeout: Annotated[
        float,
        typer.Option(
            help="Seconds that one answer of an endpoint may take.", rich_help_panel="Advanced"
        ),
    ] = TIMEOUT

    def options(self, specs: list[str]) -> dict[str, Any]:
        """Arguments of ``Endpoint``.

        Raises:
            InputError: A value is out of its range, or there is no endpoint to ask.
        """
        if not 0 < self.timeout < 86400:
            raise InputError(f"--timeout is {self.timeout}; expected seconds, more than 0.")
        if self.endpoint_model is not None and not any(map(is_url, specs)):
            raise InputError("--endpoint-model goes with an endpoint, and none is given.")
        return {
            "model": self.endpoint_model,
            "key_variable": self.api_key_variable,
            "timeout": self.timeout,
        }


@dataclass(frozen=True)
class Sources:
    """What is compared, and on what."""

    data: Annotated[str | None, typer.Option(help=DATA_HELP + " Nothing may be tuned on it.")] = (
        None
    )
    samples: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            help="In place of models and data, samples of lm-evaluation-harness of the original "
            "and of the other model (lm_eval --log_samples)."
        ),
    ] = None
    check: Annotated[
        Path | None, typer.Option(help="Compute the certificate in this folder again.")
    ] = None
    metric: Annotated[
        str | None, typer.Option(help="Metric of --samples.", rich_help_panel="Data")
    ] = None
    filter: Annotated[
        str | None, typer.Option(help="Filter of --samples.", rich_help_panel="Data")
    ] = None
    selection: Annotated[
        str | None,
        typer.Option(
            help="Data from which the range of one example's change is taken.",
            show_default="a quarter of --data, which is then not held out",
            rich_help_panel="Data",
        ),
    ] = None
    model: OwnClass = None
    weights: Weights = None
    other_weights: Annotated[
        Path | None, typer.Option(help="The same for OTHER.", rich_help_panel="Advanced")
    ] = None
    task: Annotated[str | None, setting_option("task")] = None
    batch_size: Annotated[int | None, setting_option("batch_size")] = None

    def check_given(self, original: str | None, other: str | None) -> None:
        """Refuse what is missing, or has no part in what is asked for.

        Raises:
            InputError: As said.
        """
        models = {"ORIGINAL": original, "OTHER": other, "--data": self.data}
        named = [name for name, value in models.items() if value is not None]
        if self.check is not None or self.samples is not None:
            what = "--samples" if self.check is None else "--check"
            named += ["--samples"] if self.check is not None and self.samples is not None else []
            if named:
                raise InputError(
                    f"{what} stands alone; {', '.join(named)} is given, too. Leave one out."
                )
        elif len(named) < len(models):
            missing = ", ".join(name for name in models if name not in named)
            raise InputError(
                f"{missing} is missing; expected rankfold certify ORIGINAL OTHER --data DATA, or "
                "--samples with two files."
            )
        others = {"--metric": self.metric, "--filter": self.filter}
        if self.samples is None and any(value is not None for value in others.values()):
            name = next(name for name, value in others.items() if value is not None)
            raise InputError(f"{name} goes with --samples; leave it out.")

    def reads(self, *models: str | None) -> list[Path]:
        """Files and folders that are read."""
        local = [one for one in models if one is not None and not is_url(one)]
        others = (self.data, self.selection, self.weights, self.other_weights)
        return named_paths(*local, *others, *(self.samples or ()))


@command
def certify(
    original: Annotated[str | None, typer.Argument(help=GIVEN_HELP)] = None,
    other: Annotated[
        str | None, typer.Argument(help="The changed model, named like ORIGINAL.")
    ] = None,
    *,
    sources: Sources,
    claim: Test,
    outputs: Outputs,
    served: Served,
    options: Reading,
) -> int:
    """Is a changed model no worse than the original? Exit code 0 where that is shown, else 5."""
    sources.check_given(original, other)
    if sources.check is not None:
        return _checked(sources.check, options.json)
    outputs.check(
        sources.reads(original, other, None if outputs.sign is None else str(outputs.sign))
    )
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))
        if outputs.out is not None:
            stack.enter_context(owned_output(outputs.out))
        if sources.samples is not None:
            pair = read_samples(*sources.samples, sources.metric, sources.filter)
            found = certify_samples(pair, margin=claim.margin, settings=claim.settings())
        else:
            found = _certified((original or "", other or ""), sources, claim, served, options)
        if (trouble := found.document["data"]["history"]["trouble"]) is not None:
            tell(f"warning: {trouble}")
        outputs.write(found)
    _print(found, outputs.out, options.json)
    return DONE if found.holds else DOES_NOT_HOLD


def _certified(
    specs: tuple[str, str], sources: Sources, claim: Test, served: Served, options: Reading
) -> GivenCertificate:
    device, settings = check_device(options.device), claim.settings()
    asked, data = served.options([*specs]), sources.data or ""
    read = [unchanged(models=[s], weights=w) for s, w in _local(specs, sources)]
    read.append(unchanged(data=[data, sources.selection]))
    first, second = (
        open_given(spec, device, weights=file, own=sources.model, **asked)
        for spec, file in zip(specs, (sources.weights, sources.other_weights), strict=True)
    )
    if first.identity.digest == second.identity.digest:
        tell("note: both models have the same weights")
    reader = reader_of(first, second)
    reading = options.data_options(sources.task, settings.seed)
    held_out, others = open_held_out(data, sources.selection, reader, reading, settings)
    for one in read:
        one.check_read()
    sample = held_out if others is None else others
    original, other = loss_sources(first, second, reader, sample, sources.task, sources.batch_size)
    if original.unit == OfBytes.unit:
        tell("the two have different tokenizers: losses are in nats per byte of the same text")
    found = certify_models(
        original, other, held_out, others,
        margin=claim.margin, settings=settings, progress=TerminalProgress(),
    )  # fmt: skip
    for one in read:
        one.check()
    return found


def _local(specs: tuple[str, str], sources: Sources) -> list[tuple[str, Path | None]]:
    """The models that are read from files, each with its weights."""
    both = zip(specs, (sources.weights, sources.other_weights), strict=True)
    return [(spec, weights) for spec, weights in both if not is_url(spec)]


def _checked(folder: Path, json: bool) -> int:
    document = read_given(folder)
    problems = recomputed(document)
    if json:
        print_json({"folder": str(folder), "holds": not problems, "problems": problems})
    elif problems:
        say(f"{folder} does not agree with itself:\n  {listed(problems)}")
    else:
        count = document["certificate"]["examples"]
        say(f"{folder}: the certificate follows from its {count} losses")
        say(verdict_words(document))
    return DIFFERS if problems else DONE


def _print(found: GivenCertificate, out: Path | None, json: bool) -> None:
    c = found.certificate
    if json:
        print_json(
            {**found.document, "holds": found.holds, "saved": None if out is None else str(out)}
        )
        return
    say(verdict_words(found.document))
    say(
        f"change {c.change:+.6g} ± {c.standard_error:.2g} (standard error) {c.unit}; with "
        f"{c.confidence:.0%} confidence at most {c.upper_bound:+.6g} (margin {c.margin:g})"
    )
    for metric in c.metrics:
        verdict = "" if metric.verdict is None else f" (margin {metric.margin:g}: {metric.verdict})"
        say(
            f"{metric.name} {metric.original:.4f} to {metric.factorized:.4f}; at most "
            f"{metric.upper_bound:+.4f} lost{verdict}"
        )
    others = "" if c.units == c.examples else f" in {c.units} independent units"
    say(f"{c.examples} held-out examples{others}; test {c.test}")
    if c.verdict == "not shown" and c.needed is not None:
        say(f"about {c.needed} examples would show it, if the change is what it seems")
    for name in ("original", "other"):
        one = found.document["models"][name]
        seen = "" if one["weights_seen"] else " (weights not seen)"
        say(f"{name}: {visible(one['name'])}, {one['digest'][:16]}{seen}")
    if out is not None:
        say(f"saved: {visible(out)}")
