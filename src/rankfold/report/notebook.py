"""A result as a notebook, a terminal or a table of records shows it: words, HTML, plain values.

All of it is made from the content of ``rankfold.json``; names are shown, never interpreted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from rankfold.certificate.in_words import VERDICTS, guard_words, lacking, subject
from rankfold.certificate.shown import bound_words, rendered, verdict_html
from rankfold.errors import visible
from rankfold.report.data_lines import data_lines, source_lines

Report = Mapping[str, Any]

MOST_LAYERS = 200  # rows of the table in a notebook
_SIZES = {
    "parameters": "parameters, whole model",
    "factorizable_parameters": "parameters, factorizable layers",
    "bytes": "bytes of model.safetensors",
    "flops": "FLOPs of weighted layers, one example",
}
_SIMPLE = (
    "kind", "rank", "second_rank", "form", "full_rank", "parameters", "factorized_parameters",
    "flops", "factorized_flops", "predicted_change", "interaction_factor", "reason_dense",
)  # fmt: skip


def layer_records(report: Report) -> list[dict[str, Any]]:
    """One flat record a layer, of texts, numbers and None: what pandas makes a table of.

    Those that can't be factorized are among them, with the reason and without sizes.
    """
    records = [
        {
            "layer": layer["name"],
            "shape": "x".join(map(str, layer["shape"])),
            **{key: layer.get(key) for key in _SIMPLE},
            "kept": layer["factorized_parameters"] / max(1, layer["parameters"]),
        }
        for layer in report["layers"]
    ]
    others = dict.fromkeys(records[0] if records else ("layer", "kind", "reason_dense"))
    return [
        *records,
        *(
            {**others, "layer": one["name"], "kind": one["kind"], "reason_dense": one["reason"]}
            for one in report["not_factorized"]
        ),
    ]


def size_rows(report: Report, tables: tuple[int, int] | None = None) -> list[dict[str, Any]]:
    """Original and factorized: parameters, also without the embedding tables, bytes, FLOPs."""
    before, after = report["original"], report["factorized"]
    found = {what: (before[key], after[key]) for key, what in _SIZES.items()}
    if tables is not None:
        counts = (before["parameters"], after["parameters"])
        without = tuple(count - table for count, table in zip(counts, tables, strict=True))
        found["parameters without the embedding tables"] = (without[0], without[1])
    return [
        {"what": what, "original": old, "factorized": new, "size": new / old if old else 1.0}
        for what, (old, new) in found.items()
    ]


def one_line(report: Report, name: str) -> str:
    """What ``repr`` says of a result."""
    verdict = report["certificate"]["verdict"]
    return (
        f"<Result of {report['algorithm']}: {visible(name)} at {report['ratio']:.1%} of its "
        f"parameters; {verdict}, {bound_words(report['certificate'])}>"
    )


def summary_lines(report: Report, name: str, tables: tuple[int, int] | None = None) -> list[str]:
    """What a person wants to know first, a line each.

    Args:
        report: The content of ``rankfold.json``.
        name: Of the model.
        tables: Parameters of the embedding tables, before and after, where there are some.
    """
    c, loss = report["certificate"], report["loss"]
    lines = [f"{name} at {report['ratio']:.1%} of its parameters, by {report['algorithm']}"]
    lines += [
        f"  {row['what']}: {row['original']:,} -> {row['factorized']:,} ({row['size']:.1%})"
        for row in size_rows(report, tables)
    ]
    lines += [
        f"held-out loss: {loss['original']:.4f} -> {loss['factorized']:.4f} {c['unit']}, "
        f"change {c['change']:+.4f} ± {c['standard_error']:.4f} (standard error)",
        f"verdict: {c['verdict']}: on {subject(report)} {VERDICTS[c['verdict']]} "
        f"({bound_words(c)}; {c['examples']} examples)",
    ]
    for metric in c["metrics"]:
        lines.append(f"{metric['name']}: {metric['original']:.4f} -> {metric['factorized']:.4f}")
    if loss["control_change"] is not None:
        lines.append(
            f"control: the dense original, moved by the same gradient step, changes by "
            f"{loss['control_change']:+.4f}"
        )
    if (kept := report.get("embeddings_kept")) is not None:
        lines.append(embedding_words(kept))
    if report["agreement"]:
        lines.append("no labels were used: the verdict speaks of agreement with the original")
    lines += [
        f"more {what} would not show it: the change is not below the margin"
        if needed is None
        else f"about {needed} {what} would show it, if the change is what it seems"
        for what, needed in lacking(c).items()
    ]
    if (guard := report.get("guard")) is not None:
        lines.append(f"{guard['name']}: {guard_words(guard)}")
    lines += [*source_lines(report), *data_lines(report)]
    smaller = sum(layer["rank"] is not None for layer in report["layers"])
    lines.append(
        f"layers: {smaller} factorized, {len(report['layers']) - smaller} left dense by the plan, "
        f"{len(report['not_factorized'])} that can't be factorized"
    )
    return [visible(line) for line in lines]


def embedding_words(kept: Report) -> str:
    """How near embeddings stay to the original's, and how many nearest neighbours."""
    near = ", ".join(
        f"{share:.1%} of the nearest {count}" if int(count) > 1 else f"{share:.1%} of the nearest"
        for count, share in kept["neighbours"].items()
    )
    return (
        f"embeddings: mean cosine with the original's {kept['cosine']:.4f}; neighbours kept: "
        f"{near} ({kept['examples']:,} selection examples)"
    )


def result_html(report: Report, name: str, tables: tuple[int, int] | None = None) -> Markup:
    """Verdict, sizes and layers; arguments as of ``summary_lines``."""
    layers = layer_records(report)
    words = f"on {subject(report)} {VERDICTS[report['certificate']['verdict']]}"
    return rendered(
        "result",
        title=visible(f"{name} at {report['ratio']:.1%} of its parameters"),
        head=verdict_html(report["certificate"], words),
        sizes=size_rows(report, tables),
        layers=[{key: _cell(value) for key, value in one.items()} for one in layers[:MOST_LAYERS]],
        more=max(0, len(layers) - MOST_LAYERS),
    )


def sweep_records(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """One flat record a size."""
    return [
        {
            "asked": report["target"]["size"],
            "size": report["ratio"],
            "parameters": report["factorized"]["parameters"],
            "bytes": report["factorized"]["bytes"],
            "flops": report["factorized"]["flops"],
            **{
                key: report["certificate"][key]
                for key in ("change", "standard_error", "upper_bound", "margin", "unit", "verdict")
            },
        }
        for report in reports
    ]


def together_words(reports: Sequence[Report]) -> str:
    """How sure all bounds are at once, which were computed from one held-out part."""
    confidence = reports[0]["certificate"]["confidence"]
    if len(reports) == 1:
        return f"The bound holds with {confidence:.0%} confidence."
    joint = max(0.0, 1 - len(reports) * (1 - confidence))
    return (
        f"{len(reports)} sizes were judged on the same held-out part: each bound holds with "
        f"{confidence:.0%} confidence by itself, all of them together with {joint:.0%}. "
        "A size that is chosen by these numbers has the second."
    )


def _cell(value: object) -> object:
    return visible(value) if isinstance(value, str) else value
