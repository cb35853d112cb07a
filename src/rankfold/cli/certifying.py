"""What ``certify`` does: open, test, write, print."""

from __future__ import annotations

import sys
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

from rankfold.certificate.document import JSON_FILE
from rankfold.certificate.earlier_uses import trouble_ahead
from rankfold.certificate.signature import open_key, sign
from rankfold.cli.app import DIFFERS, DOES_NOT_HOLD, DONE, say, tell, warn
from rankfold.cli.certify import Outputs, Served, Sources, Test
from rankfold.cli.inputs import unchanged
from rankfold.cli.open_given import loss_sources, open_given, open_held_out, reader_of
from rankfold.cli.options import Reading
from rankfold.cli.printed import print_json
from rankfold.errors import InputError, listed, visible
from rankfold.files.durable import write_whole
from rankfold.files.folder import check_output, folder_in_one_step, owned_output
from rankfold.given_models import GivenCertificate, certify_models, certify_samples
from rankfold.machine.device import check_device
from rankfold.machine.progress import TerminalProgress
from rankfold.others.address import is_url
from rankfold.others.by_byte import OfBytes
from rankfold.others.document import (
    BADGE_FILE,
    CARD_FILE,
    given_files,
    read_given,
    recomputed,
    verdict_words,
)
from rankfold.others.samples import read_samples

MODE = 0o644  # of the files written


def check_outputs(outputs: Outputs, reads: list[Path]) -> None:
    """Refuse what can't be written, before any work is done.

    Raises:
        InputError: As said.
    """
    if outputs.sign is not None:
        if outputs.out is None:
            raise InputError("--sign signs the folder --out; give both, or none of them.")
        open_key(outputs.sign)
    if outputs.out is not None:
        check_output(outputs.out, outputs.overwrite, JSON_FILE, reads=reads)
    for name, file in (("--badge", outputs.badge), ("--card", outputs.card)):
        if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
            raise InputError(
                f"{name} is {file}; expected the name of a file in a folder that is there."
            )


def write_outputs(outputs: Outputs, found: GivenCertificate) -> None:
    """Write all that was asked for.

    Raises:
        InputError: The system refuses something.
    """
    texts = given_files(found.document)
    if outputs.out is not None:
        with folder_in_one_step(outputs.out, outputs.overwrite) as draft:
            for name, text in texts.items():
                (draft / name).write_text(text, encoding="utf-8")
        if outputs.sign is not None:
            sign(outputs.out, outputs.sign)
    for file, name in ((outputs.badge, BADGE_FILE), (outputs.card, CARD_FILE)):
        if file is not None:
            try:
                write_whole(file, [texts[name].encode()], MODE)
            except OSError as error:
                raise InputError(f"{file} can't be written: {error}. Choose another.") from error


def certified(
    specs: tuple[str, str],
    sources: Sources,
    claim: Test,
    outputs: Outputs,
    served: Served,
    options: Reading,
) -> int:
    """Certify two models, or samples of them, and write and print the verdict; the exit code."""
    reads = sources.reads(*specs, None if outputs.sign is None else str(outputs.sign))
    check_outputs(outputs, reads)
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))
        if outputs.out is not None:
            stack.enter_context(owned_output(outputs.out))
        warn(trouble_ahead())
        if sources.samples is not None:
            pair = read_samples(*sources.samples, sources.metric, sources.filter)
            found = certify_samples(pair, margin=claim.margin, settings=claim.settings())
        else:
            found = _of_models(specs, sources, claim, served, options)
        warn(found.document["data"]["history"]["trouble"])
        write_outputs(outputs, found)
    print_certificate(found, outputs.out, options.json)
    return DONE if found.holds else DOES_NOT_HOLD


def _of_models(
    specs: tuple[str, str], sources: Sources, claim: Test, served: Served, options: Reading
) -> GivenCertificate:
    """Open both models and the data, and test them."""
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


def checked(folder: Path, json: bool) -> int:
    """Compute a folder's certificate again, and say what differs; the exit code."""
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


def print_certificate(found: GivenCertificate, out: Path | None, json: bool) -> None:
    """Print a verdict, in words or as JSON."""
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
