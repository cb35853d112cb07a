"""``rankfold export``."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rankfold.cli.app import DONE, command, say
from rankfold.cli.options import FolderArgument, Json, OwnClass
from rankfold.cli.printed import print_json
from rankfold.cli.setting_options import completing
from rankfold.errors import InputError, visible
from rankfold.export.names import DTYPES, PROGRAMS, SUMMARIES

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from rankfold.export.export import Exported


@command(needs="rankfold.cli.export_inputs")
def export(
    folder: FolderArgument,
    *,
    to: Annotated[
        str,
        typer.Option(
            help="What to write. "
            + "; ".join(f"{name}: {summary}" for name, summary in SUMMARIES.items())
            + ".",
            autocompletion=completing(SUMMARIES),
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder that it is written to.")],
    model: OwnClass = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export in --out.")
    ] = False,
    input_shape: Annotated[
        str | None,
        typer.Option(
            help="Shape of one example, for onnx and pt2: 3x224x224 of an image, or the number of "
            "tokens.",
            show_default="as the model's configuration says",
        ),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            help="In place of --input-shape, file.py:function giving a batch: a tensor, or a "
            "mapping of the model's inputs by name."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"Type of the weights, for onnx and pt2: {', '.join(DTYPES)}.",
            show_default="the artifact's",
            autocompletion=completing(DTYPES),
        ),
    ] = None,
    json: Json = False,
) -> int:
    """Write a factorized model in a form that is opened without rankfold."""
    from rankfold.cli.export_inputs import open_inputs
    from rankfold.cli.open import GIVES_MODEL, gives_module, open_model
    from rankfold.export.export import TARGETS
    from rankfold.export.export import export as export_artifact

    if to not in TARGETS:
        raise InputError(f"--to is {to!r}; expected {', '.join(TARGETS)}.")
    if model is not None and not gives_module(model):
        raise InputError(f"--model is {model}; expected {GIVES_MODEL}.")
    with redirect_stdout(sys.stderr):
        own = None if model is None else open_model(model, to_be_filled=True).model
        done = export_artifact(
            folder, out, to=to, model=own, overwrite=overwrite,
            inputs=open_inputs(input_shape, inputs), dtype=dtype,
        )  # fmt: skip
    _print_exported(done, to, out, json)
    return DONE


def _print_exported(done: Exported, to: str, out: Path, as_json: bool) -> None:
    if as_json:
        print_json({**asdict(done), "folder": str(done.folder)})
        return
    for name, parameters, size in (
        ("factorized", done.factorized_parameters, done.factorized_bytes),
        (to, done.parameters, done.bytes),
    ):
        say(f"{name}: {parameters:,} parameters, {size:,} bytes")
    if to in PROGRAMS:
        say(f"of any length: {', '.join(done.dynamic)}")
        say(
            "not compared with the model: onnxruntime isn't installed"
            if done.difference is None
            else f"largest relative difference from the model: {done.difference:.1e}"
        )
    say(f"saved: {visible(out)}")
