"""What ``lossless`` and ``compact`` share: open, compress, save, print."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import cast

from rankfold.artifact.save import try_saving
from rankfold.certificate.document import history_line
from rankfold.certificate.earlier_uses import trouble_ahead
from rankfold.cli.app import mention, say, warn
from rankfold.cli.config import run_files
from rankfold.cli.inputs import unchanged
from rankfold.cli.kept import save_result, say_speed
from rankfold.cli.named_paths import named_paths
from rankfold.cli.open import OpenedModel, open_model
from rankfold.cli.opened_data import opened_data
from rankfold.cli.options import Compressing
from rankfold.cli.printed import print_json
from rankfold.cli.tables import plain_console, print_result
from rankfold.data.parts import Data
from rankfold.errors import visible
from rankfold.files.folder import owned_output
from rankfold.integrations.vision import parse_named
from rankfold.keywords import Options
from rankfold.machine.device import check_device, unused_gpu
from rankfold.machine.offload import advice, amount_of
from rankfold.machine.progress import TerminalProgress
from rankfold.machine.weights import in_files
from rankfold.model.sizes import model_parameters
from rankfold.result import Result


def compress(
    algorithm: Callable[..., Result],
    model: str,
    options: Compressing,
    saved: Callable[[Result], bool] = lambda _: True,
    size: float = 1,
) -> Result:
    """Open model and data, run the algorithm, save what it found and print it."""
    folders = options.folders
    key = folders.key()
    out = folders.output(named_paths(model, folders.weights, *vars(options.parts).values()))
    with owned_output(out), redirect_stdout(sys.stderr):
        mention(f"opening {visible(model)}")
        given = unchanged(
            models=[model], weights=folders.weights, data=vars(options.parts).values()
        )
        opened, data, guard = open_all(model, options, out, size)
        given.check_read(whole=in_files(opened.model))
        result = algorithm(
            opened.model,
            data,
            guard=guard,
            progress=TerminalProgress(),
            timing=not folders.no_timing,
            **cast("Options", folders.of_run() | vars(options.settings)),
        )
        given.check()
        history = result.document["data"]["history"]
        warn(history["trouble"])
        keep = saved(result)
        if keep:
            save_result(result, opened, folders, out, texts=run_files(), sign=key)
    if options.reading.json:
        place = str(out) if keep else None
        print_json({**result.report, "history": history, "saved": place})
        return result
    console = plain_console(sys.stdout)
    print_result(console, result.report, f"{model}: {result.report['algorithm']}")
    if history["others"]:
        say(f"opened: {history_line(history, result.certificate.confidence)}")
    say_speed(result.latency)
    if keep:
        say(f"saved: {visible(out)}")
    return result


def open_all(
    model: str, options: Compressing, out: Path, size: float
) -> tuple[OpenedModel, Data, object]:
    """Model, data, and examples of another kind, where a model of this size can be saved.

    Raises:
        InputError: Names what is wrong with one of them.
    """
    parts, settings = options.parts, options.settings
    parts.check()
    amount_of("max_shard_size", options.folders.max_shard_size)  # before any work
    warn(trouble_ahead())
    device = check_device(options.reading.device)
    if (hint := unused_gpu(device)) is not None:
        mention(hint)
    offload = options.folders.of_weights(model, device.type)
    opened = open_model(model, options.folders.weights, offload=offload)
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
        mention(hint)
    return opened, *opened_data(opened, parts, settings, options.reading)
