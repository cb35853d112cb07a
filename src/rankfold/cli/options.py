"""The options of the command line, each declared once.

Those that decide a result are made from the fields of ``Settings`` (``setting_options``); the
others are the fields of the groups below. A command takes a group as one argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from inspect import Parameter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, cast, get_args, get_type_hints

import typer
from typer.models import OptionInfo

from rankfold.cli.config import Config
from rankfold.cli.room import Room
from rankfold.cli.setting_options import chosen_settings, completing, setting_parameters
from rankfold.cli.short_help import HelpAll
from rankfold.errors import InputError
from rankfold.files.folder import check_output
from rankfold.settings import EVERYDAY, RESEARCH, Settings, SizeOf

if TYPE_CHECKING:  # it imports torch, which takes seconds
    from rankfold.certificate.signature import SigningKey
    from rankfold.cli.data_options import DataOptions

SELF = "self"  # DATA that the language model writes itself; a file of this name is ./self

# In the order in which the help shows them; the last is hidden.
PANELS = (
    EVERYDAY, "Output", "Data", "Reading files", "Certificate", "Search", "Advanced", RESEARCH,
)  # fmt: skip

FIRST = ("data", "out")  # options that the help begins with

MODEL_HELP = (
    "A transformers folder, a .gguf file, or, with --weights, timm:NAME, torchvision:NAME or "
    "file.py:function giving an nn.Module."
)
DATA_HELP = (
    "A text, .jsonl, .csv, .tsv, .parquet or .npz file (x and y), a folder of class folders of "
    "images or wav files or of datasets (save_to_disk), file.py:function, or self: text that the "
    "model writes."
)

ModelArgument: TypeAlias = Annotated[str, typer.Argument(help=MODEL_HELP)]
FolderArgument: TypeAlias = Annotated[
    Path, typer.Argument(help="The --out folder of an earlier run.")
]
OwnClass: TypeAlias = Annotated[
    str | None, typer.Option(help="For a class of your own: file.py:function giving it.")
]
Quiet: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--quiet",
        help="Print nothing on stderr but errors and warnings.",
        rich_help_panel="Output",
    ),
]
Verbose: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--verbose",
        help="Log on stderr what a report of a fault needs: versions, options, time and memory.",
        rich_help_panel="Output",
    ),
]
Json: TypeAlias = Annotated[
    bool,
    typer.Option("--json", help="Print the result as one JSON object.", rich_help_panel="Output"),
]


def margin_option(panel: str | None = None) -> OptionInfo:
    """What ``lossless`` gives a verdict on, and ``compact`` aims at."""
    found: OptionInfo = typer.Option(
        help="Change of the mean loss that counts as no harm, in nats.", rich_help_panel=panel
    )
    return found


SizeOfOption: TypeAlias = Annotated[
    str,
    typer.Option(
        help="What a size is a share of: model, or factorizable, the layers that can be "
        "factorized.",
        rich_help_panel="Search",
        autocompletion=completing(get_args(SizeOf)),
    ),
]


def read_size_of(size_of: str) -> SizeOf:
    """What a size is a share of.

    Raises:
        InputError: It is none of the words.
    """
    if size_of not in get_args(SizeOf):
        raise InputError(f"--size-of is {size_of!r}; expected model or factorizable.")
    return cast("SizeOf", size_of)


@dataclass(frozen=True)
class Reading:
    """How data is read, and where the model runs on it."""

    length: Annotated[
        int | None,
        typer.Option(
            help="Length of a window of text, in tokens.",
            show_default="512, or what the model takes",
            rich_help_panel="Data",
        ),
    ] = None
    mean: Annotated[
        str | None,
        typer.Option(
            help="Subtracted from images, a number a channel, of values 0 to 1: .485,.456,.406.",
            show_default="as the model's preprocessor_config.json or timm says, else nothing",
            rich_help_panel="Reading files",
        ),
    ] = None
    std: Annotated[
        str | None,
        typer.Option(
            help="What images are divided by then, a number a channel: .229,.224,.225.",
            show_default="as the model's preprocessor_config.json or timm says, else 1",
            rich_help_panel="Reading files",
        ),
    ] = None
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Side of the images of a folder, in pixels.",
            show_default="as the model's preprocessor_config.json or timm says, else 224",
            rich_help_panel="Reading files",
        ),
    ] = None
    skip_broken: Annotated[
        bool,
        typer.Option(
            "--skip-broken",
            help="Name and leave out files of a folder that are broken.",
            rich_help_panel="Reading files",
        ),
    ] = False
    text_column: Annotated[
        str | None,
        typer.Option(
            help="Column of the text in a .jsonl, .csv, .tsv or .parquet.",
            show_default="text",
            rich_help_panel="Reading files",
        ),
    ] = None
    label_column: Annotated[
        str | None,
        typer.Option(
            help="Column of the label in such a file.",
            show_default="label",
            rich_help_panel="Reading files",
        ),
    ] = None
    target_column: Annotated[
        str | None,
        typer.Option(
            help="Column of the target text, for seq2seq.",
            show_default="target",
            rich_help_panel="Reading files",
        ),
    ] = None
    tokens_column: Annotated[
        str | None,
        typer.Option(
            help="Column of the lists of tokens, for token-classification.",
            show_default="tokens",
            rich_help_panel="Reading files",
        ),
    ] = None
    tags_column: Annotated[
        str | None,
        typer.Option(
            help="Column of the lists of labels, one a token.",
            show_default="tags",
            rich_help_panel="Reading files",
        ),
    ] = None
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda or cuda:1.")] = "cpu"
    json: Json = False

    def data_options(self, task: str | None, seed: int = 0) -> DataOptions:
        """The same for ``rankfold.cli.data_options``."""
        from rankfold.cli.data_options import DataOptions

        return DataOptions(
            mean=_numbers("--mean", self.mean),
            std=_numbers("--std", self.std),
            image_size=self.image_size,
            skip_broken=self.skip_broken,
            length=self.length,
            task=task,
            text_column=self.text_column,
            label_column=self.label_column,
            target_column=self.target_column,
            tokens_column=self.tokens_column,
            tags_column=self.tags_column,
            seed=seed,
        )


@dataclass(frozen=True)
class Parts:
    """Where the three parts of the data come from."""

    data: Annotated[
        str | None,
        typer.Option(
            help=DATA_HELP + " It is split into the three parts. Needed, unless these are given."
        ),
    ] = None
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Data for the statistics, like --data and in its place.", rich_help_panel="Data"
        ),
    ] = None
    selection: Annotated[
        str | None,
        typer.Option(
            help="Data for choosing the step and the ranks, like --data and in its place.",
            rich_help_panel="Data",
        ),
    ] = None
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Data for the certificate, like --data and in its place.", rich_help_panel="Data"
        ),
    ] = None
    guard: Annotated[
        str | None,
        typer.Option(
            help="Data of another kind than --data, read like it: what a smaller model loses there "
            "stands beside the verdict.",
            show_default="text that a language model writes itself",
            rich_help_panel="Certificate",
        ),
    ] = None

    def check(self) -> None:
        """Refuse what is missing, or said twice.

        Raises:
            InputError: As said.
        """
        parts = (self.calibration, self.selection, self.held_out)
        if self.data is not None and any(parts):
            raise InputError(
                "--data is split into the parts; give either --data, or --calibration, "
                "--selection and --held-out."
            )
        if self.data is None and not all(parts):
            raise InputError(
                "there is no data; give --data, or all of --calibration, --selection and "
                "--held-out."
            )
        if self.guard == SELF:
            raise InputError(
                "--guard is self, which is what stands for it where it isn't given; leave it out, "
                "or give other data."
            )


@dataclass(frozen=True)
class Folders(Room):
    """Where results and what a run needs lie."""

    out: Annotated[Path | None, typer.Option(help="Folder that the model is saved in. Needed.")] = (
        None
    )
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace an earlier result in --out.",
            rich_help_panel="Output",
        ),
    ] = False
    no_report: Annotated[
        bool,
        typer.Option(
            "--no-report",
            help="Leave out report.html, the page that shows the result.",
            rich_help_panel="Output",
        ),
    ] = False
    max_shard_size: Annotated[
        str,
        typer.Option(
            metavar="AMOUNT",
            help="Most weights in a file of the result; more are written into several.",
            rich_help_panel="Output",
        ),
    ] = "5GB"
    no_timing: Annotated[
        bool,
        typer.Option(
            "--no-timing",
            help="Don't measure how fast original and result are (20 s at most), nor the stages.",
            rich_help_panel="Output",
        ),
    ] = False
    statistics: Annotated[
        Path | None,
        typer.Option(
            help="Folder that rankfold statistics wrote of this model and data; then nothing is "
            "collected.",
            rich_help_panel="Advanced",
        ),
    ] = None
    sign: Annotated[
        Path | None,
        typer.Option(
            help="Sign the result with this private Ed25519 key, a PEM file; rankfold verify --key "
            "checks it.",
            rich_help_panel="Certificate",
        ),
    ] = None

    def key(self) -> SigningKey | None:
        """The key that signs the result, opened before any work is done.

        Raises:
            InputError: It can't be used.
        """
        from rankfold.certificate.signature import open_key

        return None if self.sign is None else open_key(self.sign)

    def of_run(self) -> dict[str, Any]:
        """The keywords of ``lossless`` and ``compact`` for all that isn't written."""
        return {**self.of_large_tensors(), "statistics": self.statistics}

    def output(self, reads: Sequence[Path] = ()) -> Path:
        """The folder to write to, checked before any work is done.

        Args:
            reads: Files and folders that the run reads.

        Raises:
            InputError: None is given, or it can't be written.
        """
        from rankfold.artifact.manifest import MANIFEST_FILE

        if self.out is None:
            raise InputError("--out is missing; expected a folder to save the model in.")
        check_output(self.out, self.overwrite, MANIFEST_FILE, reads=reads)
        return self.out


@dataclass(frozen=True)
class Compressing:
    """Everything that ``lossless`` and ``compact`` share."""

    parts: Parts
    folders: Folders
    settings: Settings
    reading: Reading


OF_ALL = ("config", "quiet", "verbose", "help_all")


def of_all_commands(repeats: bool) -> list[Parameter]:
    """The options that every command has.

    Args:
        repeats: Whether it takes options from a file.
    """
    hints = {"quiet": Quiet, "verbose": Verbose, "help_all": HelpAll}
    kind = Parameter.KEYWORD_ONLY
    found = [Parameter(name, kind, default=False, annotation=hint) for name, hint in hints.items()]
    return [Parameter("config", kind, default=None, annotation=Config)] * repeats + found


def spread(group: Any) -> list[Parameter]:
    """The options of a group: those of its fields, and of the groups among them."""
    if group is Settings:
        return setting_parameters()
    types = get_type_hints(group, include_extras=True)
    found: list[Parameter] = []
    for one in fields(group):
        if is_dataclass(types[one.name]):
            found += spread(types[one.name])
        else:
            kind = Parameter.KEYWORD_ONLY
            found.append(Parameter(one.name, kind, default=one.default, annotation=types[one.name]))
    return found


def gathered(group: Any, values: dict[str, Any]) -> Any:
    """The group, of values of its options, which are taken out of ``values``.

    Raises:
        InputError: A setting is out of its range.
    """
    if group is Settings:
        return chosen_settings(values)
    types = get_type_hints(group, include_extras=True)
    own = {
        one.name: gathered(types[one.name], values)
        if is_dataclass(types[one.name])
        else values.pop(one.name)
        for one in fields(group)
    }
    return group(**own)


def in_panels(parameters: Sequence[Parameter]) -> list[Parameter]:
    """Arguments, then options by their panels; within one the first ones, then as they stand."""

    def place(parameter: Parameter) -> tuple[int, int]:
        info = getattr(parameter.annotation, "__metadata__", (None,))[0]
        panel = getattr(info, "rich_help_panel", None) or EVERYDAY
        number = PANELS.index(panel) if isinstance(info, OptionInfo) else -1
        first = FIRST.index(parameter.name) if parameter.name in FIRST else len(FIRST)
        return number, first

    return sorted(parameters, key=place)


def _numbers(option: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(value) for value in text.split(",")]
    except ValueError as error:
        raise InputError(
            f"{option} is {text!r}; expected numbers separated by commas, one a channel."
        ) from error
