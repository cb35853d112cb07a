"""Results as a person reads them on a terminal."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as AnyTable
from rich.text import Text

from rankfold.certificate.in_words import about, guard_words, lacking, sure
from rankfold.cli.app import as_options
from rankfold.errors import InputError, visible
from rankfold.report.data_lines import data_lines

NATURAL = 10_000  # columns of a console on which every table has room
VERDICT_STYLE = {"better": "bold green", "lossless": "green", "not shown": "yellow", "worse": "red"}


def plain_console(file: TextIO, width: int = 120) -> Console:
    """A console that shows texts as they are: in a name, brackets and colons mean nothing.

    Its tables keep their columns where the output is no terminal, so wide then.
    """
    return Console(
        file=file, width=None if file.isatty() else width, markup=False, emoji=False,
        highlight=False,
    )  # fmt: skip


class Table(AnyTable):
    """A table whose cells show a text as it is."""

    def add_row(self, *cells: object, **options: Any) -> None:
        """Add one."""
        super().add_row(*(Text(visible(getattr(cell, "plain", cell))) for cell in cells), **options)


def evaluation_lines(found: dict[str, Any]) -> list[str]:
    """Loss, perplexity and accuracy of one model."""
    loss, examples = found["loss"], found["examples"]
    lines = [
        f"loss {loss['mean']:.4f} ± {loss['standard_error']:.4f} (standard error) {loss['unit']}, "
        f"{examples} examples"
    ]
    if "token" in loss["unit"]:
        lines.append(f"perplexity {math.exp(min(700.0, loss['mean'])):.2f}")
    if found["accuracy"] is not None:
        lines.append(f"accuracy {found['accuracy']:.4f}")
    return [*lines, *_data_lines(found)]


def result_table(report: dict[str, Any]) -> Table:
    """Original and factorized side by side; every row names its unit and what it counts."""
    table = Table()
    table.add_column("")
    table.add_column("original", justify="right")
    table.add_column("factorized", justify="right")
    table.add_column("size", justify="right")
    before, after, loss = report["original"], report["factorized"], report["loss"]
    for label, key in (
        ("parameters, whole model", "parameters"),
        ("parameters, factorizable layers", "factorizable_parameters"),
        ("bytes on disk, model.safetensors", "bytes"),
        ("FLOPs of weighted layers, one example", "flops"),
    ):
        share = f"{after[key] / before[key]:.4f}" if before[key] else ""
        table.add_row(label, f"{before[key]:,}", f"{after[key]:,}", share)
    unit = loss["unit"]
    table.add_row(f"held-out loss, {unit}", f"{loss['original']:.4f}", f"{loss['factorized']:.4f}")
    if "token" in unit:
        perplexities = (f"{math.exp(min(700.0, loss[k])):.2f}" for k in ("original", "factorized"))
        table.add_row("held-out perplexity", *perplexities)
    accuracy = report["accuracy"]
    if accuracy["original"] is not None:
        label = "held-out token accuracy" if "token" in unit else "held-out accuracy"
        table.add_row(label, *(f"{accuracy[k]:.4f}" for k in ("original", "factorized")))
    guard = report.get("guard")
    if guard is not None:
        losses = [guard.get(key) for key in ("original", "factorized")]
        shown = ["not measured" if value is None else f"{value:.4f}" for value in losses]
        table.add_row(f"loss on {guard['name']}", *shown)
    return table


def result_lines(report: dict[str, Any]) -> list[str | Text]:
    """The change, its control, the verdict, and what happened to the layers."""
    loss, certificate = report["loss"], report["certificate"]
    lines: list[str | Text] = [
        f"loss change {certificate['change']:+.4f} ± {certificate['standard_error']:.4f} "
        f"(standard error) {certificate['unit']}"
        + (
            f"; predicted {loss['predicted_change']:+.4f}"
            if loss["predicted_change"] is not None
            else ""
        )
    ]
    if loss["control_change"] is not None:
        lines.append(
            f"of this, the gradient step alone gives {loss['control_change']:+.4f} (control: the "
            "dense model moved by the same step; it adapts the model to the calibration data)"
        )
    allocation = report.get("allocation")
    if allocation is not None:
        gap = allocation["gap"]
        proof = f"at most {gap:.1e} above the lowest" if gap else "proven the lowest"
        factors = [layer.get("interaction_factor") for layer in report["layers"]]
        how = ", with measured interactions" if any(factors) else ""
        lines.append(
            f"ranks: predicted cost of truncation {allocation['predicted_cost']:+.4f}{how}, "
            f"{proof} of this size"
        )
    refit = report.get("refit")
    if refit is not None:
        gain = "no finite change" if refit["gain"] is None else f"{refit['gain']:+.4f}"
        lines.append(
            f"fitted again to what the others changed: {len(refit['layers'])} layers "
            f"({len(refit['residual'])} of them to the sums that they are part of), by "
            f"{refit['examples']} calibration examples; {gain} on selection data"
        )
    lines += _verdict_lines(report)
    lines += certificate_lines(certificate)
    if report.get("agreement"):
        lines.append(
            "no labels were used: the loss is the distance from the original model's own outputs, "
            "so the verdict speaks of agreement with the original, not of being right"
        )
    lines += _data_lines(report)
    low_rank = sum(layer["rank"] is not None for layer in report["layers"])
    lines.append(
        f"layers: {low_rank} factorized, {len(report['layers']) - low_rank} left dense by the "
        f"plan, {len(report['not_factorized'])} not factorized{_reasons(report)}"
    )
    return lines


def _verdict_lines(report: dict[str, Any]) -> list[str | Text]:
    """The verdict and which data it is about, and what is known of others."""
    certificate, guard = report["certificate"], report.get("guard")
    of, which = about(report["task"], report.get("data", {}), guard), ""
    if guard is not None and certificate.get("guard") is not None:
        of += f" and on {guard['name']} (both must hold)"
        which = " on the first"
    said = (
        f", on {of}: with {sure(certificate['confidence'])} confidence the change{which} is at "
        f"most {certificate['upper_bound']:+.4f} (margin {certificate['margin']:g} "
        f"{certificate['unit']}, {certificate['examples']} held-out examples that nothing was "
        "tuned on)"
    )
    verdict = certificate["verdict"]
    found = [Text.assemble("verdict: ", (verdict, VERDICT_STYLE[verdict]), visible(said))]
    if guard is None:
        return [*found]
    words = as_options(guard_words(guard), [guard["source"]] if guard.get("source") else [])
    return [*found, f"{guard['name']}: {words}"]


def _data_lines(report: Mapping[str, Any]) -> list[str]:
    """As options, but for names of the user's columns, which may look like arguments."""
    entries = (report, *report.get("data", {}).values(), report.get("guard") or {})
    columns = [name for entry in entries for name in entry.get("columns_left_out") or ()]
    return [as_options(line, columns) for line in data_lines(report)]


def certificate_lines(certificate: dict[str, Any]) -> list[str]:
    """The test and its range, the metrics, and what is missing where nothing is shown."""
    lines = []
    if certificate.get("highest") is not None:
        lines.append(
            f"test: {certificate['test']}, any distribution; one example's change counts up to "
            f"{certificate['highest']:+.4f} ({certificate['range_from']}), {certificate['above']} "
            f"of {certificate['units']} were above it, at most {certificate['share_above']:.1%} "
            f"are; t bound {certificate['t_upper_bound']:+.4f}"
        )
    elif "test" in certificate:
        lines.append("test: t; it assumes a nearly normal mean of the changes")
    for metric in certificate.get("metrics", ()):
        margin = "" if metric["margin"] is None else f" (margin {metric['margin']:g})"
        lines.append(
            f"{metric['name']}: at most {metric['upper_bound']:+.4f} is lost{margin}"
            + (f": {metric['verdict']}" if metric["verdict"] else "")
        )
    lines += [
        f"more {what} would not show it: the measured change is not below the margin"
        if needed is None
        else f"about {needed} {what} would show it, if the change is what it seems"
        for what, needed in lacking(certificate).items()
    ]
    return lines


def _reasons(report: dict[str, Any]) -> str:
    counted = Counter(entry["reason"] for entry in report["not_factorized"])
    names = _names(report)
    listed = "; ".join(
        f"{count} x {as_options(reason, names)}" for reason, count in counted.most_common()
    )
    return f" ({listed})" if listed else ""


def _names(report: dict[str, Any]) -> list[str]:
    """Of all layers."""
    return [entry["name"] for key in ("layers", "not_factorized") for entry in report[key]]


def print_result(console: Console, report: dict[str, Any], title: str) -> None:
    """The title, the table and the lines."""
    _print_title(console, title)
    console.print(result_table(report))
    for line in result_lines(report):
        console.print(line if isinstance(line, Text) else visible(line))


def print_curve(console: Console, report: dict[str, Any], name: str) -> None:
    """Of one layer the predicted change of the loss at some of its ranks.

    Raises:
        InputError: There is no such layer, or its objective predicts no loss.
    """
    layer, table = curve_table(report, name)
    rank = layer["rank"] or "dense"
    _print_title(console, f"{layer['name']}: rank {rank} of {layer['full_rank']}")
    console.print(table)


def _print_title(console: Console, title: str) -> None:
    """On a line of its own: a table would fold it to its own width."""
    console.print(Text(visible(title), "bold"), soft_wrap=True)


def _rank_cells(layer: dict[str, Any]) -> tuple[str, str]:
    if layer["rank"] is None:
        return "", "dense"
    ranks = [layer["rank"], layer.get("second_rank")]
    return ", ".join(str(rank) for rank in ranks if rank), layer["form"]


def _range_cells(found: dict[str, Any]) -> tuple[str, str, str]:
    share = found["signal"] / found["noise"] if found["noise"] else math.inf
    return f"{found['radius']:.4f}", str(found["lossless_rank"]), f"{share:.2f}"


def curve_table(report: dict[str, Any], name: str) -> tuple[dict[str, Any], Table]:
    """A layer, by its name or as that is shown, and its predicted changes of the loss.

    Raises:
        InputError: There is no such layer, or its objective predicts no loss.
    """
    layers = {layer["name"]: layer for layer in report["layers"]}
    as_shown = {visible(known): known for known in layers}
    name = name if name in layers else as_shown.get(name, name)
    if name not in layers:
        known = ", ".join([*as_shown][:5])
        raise InputError(f"no factorized layer is called {name!r}; names look like {known}.")
    points = layers[name].get("predicted_by_rank")
    if not points:
        raise InputError(
            f"the objective {report['settings']['objective']} predicts no loss; expected kronecker "
            "or joint."
        )
    table = Table()
    table.add_column("rank", justify="right")
    table.add_column("predicted change", justify="right")
    for rank, change in points:
        table.add_row(str(rank), f"{change:+.6f}")
    return layers[name], table


RANGES = ("harmless\nradius", "lossless\nrank alone", "signal\n/ noise")
GRAM = "Gram of"
# What a narrow terminal does without, in this order: layers' names are never cut.
DISPENSABLE = ((GRAM,), RANGES, ("kind", "parameters"), ("shape", "form"))


def layers_table(report: dict[str, Any], width: int) -> Table:
    """One row a layer: shape, rank, parameters, predicted change, harmless range.

    Args:
        report: Of an artifact.
        width: Of the terminal; columns that don't fit are left out, and named below.
    """
    rows = [_layer_cells(layer) for layer in report["layers"]]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    left_out: list[str] = []
    for more in ((), *DISPENSABLE):
        left_out += [column for column in more if column in columns]
        table = _listing("layers", [column for column in columns if column not in left_out])
        for row in rows:
            cells = (row.get(column, "") for column in columns if column not in left_out)
            table.add_row(*map(Text, cells))
        if Console(width=NATURAL).measure(table).maximum <= width:
            break
    if left_out:
        names = ", ".join(column.replace("\n", " ") for column in left_out)
        table.caption = f"{width} columns are too narrow for: {names} (--json has all)"
    return table


def _layer_cells(layer: dict[str, Any]) -> dict[str, str]:
    """By column. A layer without a harmless range, or with both Grams, has no such cells."""
    predicted, found = layer["predicted_change"], layer.get("harmless_range")
    rank, form = _rank_cells(layer)
    cells = {
        "layer": visible(layer["name"]),
        "kind": visible(layer["kind"]),
        "shape": "x".join(str(side) for side in layer["shape"]),
        "rank": rank,
        "form": form,
        "parameters": f"{layer['factorized_parameters']:,}",
        "size": f"{layer['factorized_parameters'] / layer['parameters']:.3f}",
        "predicted": "" if predicted is None else f"{predicted:+.5f}",
    }
    if (side := layer.get("whole_grams")) in ("input", "output"):
        cells[GRAM] = f"{side}s"
    return cells | (dict(zip(RANGES, _range_cells(found), strict=True)) if found else {})


def not_factorized_table(report: dict[str, Any]) -> Table:
    """One row a layer that can't be factorized, with the reason."""
    table = _listing("not factorized", ["layer", "kind", "reason"])
    names = _names(report)
    for entry in report["not_factorized"]:
        cells = entry["name"], entry["kind"], as_options(entry["reason"], names)
        table.add_row(*(Text(visible(cell)) for cell in cells))
    return table


def _listing(title: str, columns: list[str]) -> Table:
    """A table with a line for each layer; texts are folded where there is too little room."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.caption_justify = "left"
    for column in columns:
        text = column in ("layer", "kind", "shape", "form", "reason", GRAM)
        table.add_column(
            column,
            justify="left" if text else "right",
            overflow="fold",
            no_wrap=column not in ("layer", "reason"),
        )
    return table
