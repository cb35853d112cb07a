"""``rankfold certify``: the paired test and its certificate for any two models."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from rankfold.certificate.asked import DEFAULT_MARGIN, TestName
from rankfold.cli.app import command
from rankfold.cli.options import DATA_HELP, MODEL_HELP, OwnClass, Reading, margin_option
from rankfold.cli.room import Weights
from rankfold.cli.setting_options import setting_option
from rankfold.errors import InputError
from rankfold.others.address import TIMEOUT, is_url
from rankfold.settings import Settings

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
        from rankfold.cli.named_paths import named_paths

        local = [one for one in models if one and not is_url(one)]
        others = (self.data, self.selection, self.weights, self.other_weights)
        return named_paths(*local, *others, *(self.samples or ()))


@command(needs="rankfold.cli.certifying")
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
    from rankfold.cli.certifying import certified, checked

    sources.check_given(original, other)
    if sources.check is not None:
        return checked(sources.check, options.json)
    return certified((original or "", other or ""), sources, claim, outputs, served, options)
