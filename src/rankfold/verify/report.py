"""What ``rankfold.json`` says, against the certificate, its evidence and the weights.

What follows from something else in the folder is computed from it. What nothing follows from is
listed as not checked: a digest shows that it was edited, and whoever edits can make a new digest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from rankfold.artifact.manifest import MANIFEST_FILE, Manifest
from rankfold.artifact.schema import LayerFields
from rankfold.certificate.change import weighted_mean
from rankfold.certificate.differences import EXACT
from rankfold.certificate.document import JSON_FILE, Document, Evidence
from rankfold.certificate.earlier_uses import recorded_before
from rankfold.data.parts import FEWEST
from rankfold.errors import visible
from rankfold.files.checked import known_fields
from rankfold.files.digests import json_digest
from rankfold.files.tensors import METADATA, model_sizes, safetensors_bytes
from rankfold.forms.layer import FactorizedLayer
from rankfold.model.sizes import model_parameters
from rankfold.verify.checks import Check, found_in

FORMAT_FIELDS = ("format_version", "versions", "model", "digest", "config_digest", "files")
LOOKS = 16  # times that the betting test looks whether it may stop
# Only the run knows them: nothing in the folder, the data or the original gives them again. Each is
# a place in a file, with all that stands under it; [] is any element of a list.
NOT_TRACED = {
    "rankfold": (
        "algorithm", "target", "settings", "agreement", "allocation", "damping", "device",
        "curvature", "calibration_loss", "embeddings_kept", "step", "rounds", "refit",
        "selection", "sources", "input_settings", "left_out", "not_factorized", "versions",
        "loss.predicted_change",
        "loss.control", "loss.control_change", "loss.control_standard_error",
        "loss.control_change_standard_error", "loss.unit", "certificate.margin",
        "certificate.unit", "original", "layers[].kind", "layers[].flops",
        "layers[].factorized_flops", "layers[].predicted_change", "layers[].predicted_by_rank",
        "layers[].interaction_factor", "layers[].whole_grams", "layers[].grams_lack",
        "layers[].harmless_range", "layers[].reason_dense", "model.class", "data",
    ),
    "certificate": (
        "statement", "data.parts", "data.look_alikes", "data.held_out_groups", "run.order",
        "run.settings", "run.versions", "run.task", "run.algorithm", "certificate.margin",
        "certificate.unit", "models.class", "models.name",
    ),
}  # fmt: skip


def report_checks(
    manifest: Manifest, document: Document, model: nn.Module, tensors: Mapping[str, Tensor]
) -> list[Check]:
    """All of these, but for what follows from losses; ``tensors`` are the artifact's weights."""
    return [
        _digests(manifest, document),
        found_in(f"{MANIFEST_FILE} and {JSON_FILE}", [*_shared(manifest, document)]),
        found_in(f"sizes in {MANIFEST_FILE}", [*_sizes(manifest, model, tensors)]),
        found_in("numbers of examples", [*_counts(document)]),
        found_in("statement", [*_statement(manifest, document)]),
        _history(document),
        *_unknown(manifest, document),
        Check(
            "what only the run knows",
            "not checked",
            f"in {JSON_FILE}: {', '.join(NOT_TRACED['certificate'])}; in {MANIFEST_FILE}: "
            f"{', '.join(NOT_TRACED['rankfold'])}. A digest shows an edit only of who makes no "
            "new one",
        ),
    ]


def loss_check(manifest: Manifest, evidence: Evidence, tolerance: float) -> Check:
    """The losses and accuracies that ``rankfold.json`` tells, from those of single examples."""
    before, after = evidence.original, evidence.factorized
    errors = [weighted_mean(one.losses, one.terms).standard_error for one in (before, after)]
    found: dict[str, float | None] = {
        "loss.original": before.mean,
        "loss.original_standard_error": errors[0],
        "loss.factorized": after.mean,
        "loss.factorized_standard_error": errors[1],
        "accuracy.original": before.accuracy,
        "accuracy.factorized": after.accuracy,
    }
    problems = []
    for name, value in found.items():
        group, _, key = name.partition(".")
        if key not in manifest[group]:
            continue  # not written by an earlier version
        stated = manifest[group][key]
        slack = tolerance * (100 if group == "accuracy" else 1)
        if not _near(stated, value, slack):
            problems.append(f"{name}: {stated!r} stated, {value!r} found")
    return found_in(f"losses in {MANIFEST_FILE}", problems)


def original_check(manifest: Manifest, original: nn.Module) -> Check:
    """The sizes of the original."""
    sizes = model_sizes(original)
    return found_in(
        "sizes of the original",
        [
            f"original.{name}: {manifest['original'][name]} stated, {value} found"
            for name, value in sizes.items()
            if manifest["original"][name] != value
        ],
    )


def _near(stated: Any, found: float | None, tolerance: float) -> bool:
    if stated is None or found is None:
        return stated is found
    return math.isclose(stated, found, rel_tol=EXACT, abs_tol=max(tolerance, 1e-12))


def _digests(manifest: Manifest, document: Document) -> Check:
    what = f"fields of {MANIFEST_FILE}"
    stated = document.get("report")
    if not stated:
        detail = "the certificate of an earlier version has no digests of them"
        return Check(what, "not checked", detail)
    wrong = [
        f"{name} is not what was saved" if name in manifest else f"{name} is missing"
        for name, digest in stated.items()
        if name not in manifest or json_digest(manifest[name]) != digest
    ]
    return found_in(what, wrong)


def _unknown(manifest: Manifest, document: Document) -> list[Check]:
    known = {*FORMAT_FIELDS, *document.get("report", {})}
    more = [name for name in manifest if name not in known]
    of_layers = {*known_fields(LayerFields), "uses"}
    inner = {name for layer in manifest["layers"] for name in layer if name not in of_layers}
    more += [f"layers[].{name}" for name in sorted(inner)]
    if not more or "report" not in document:
        return []
    what = f"more fields of {MANIFEST_FILE}"
    shown = ", ".join(map(visible, more))
    return [Check(what, "not checked", f"the certificate says nothing of {shown}")]


def _shared(manifest: Manifest, document: Document) -> Iterator[str]:
    """What both files say."""
    run, certificate, loss = document["run"], document["certificate"], manifest["loss"]
    pairs: dict[str, tuple[object, object]] = {
        name: (manifest[name], run[name])
        for name in ("algorithm", "task", "settings", "ratio", "versions")
    }
    pairs |= {
        "data": (manifest["data"], document["data"]["parts"]),
        "model.class": (manifest["model"]["class"], document["models"]["class"]),
        "target.margin": (manifest["target"].get("margin"), certificate["margin"]),
        "loss.unit": (loss["unit"], certificate["unit"]),
        "loss.change": (loss["change"], certificate["change"]),
        "loss.standard_error": (loss["standard_error"], certificate["standard_error"]),
    }
    for name, (one, other) in pairs.items():
        if one != other:
            yield f"{name}: {_short(one)} in {MANIFEST_FILE}, {_short(other)} in {JSON_FILE}"
    if loss.get("control") is not None and not _near(
        loss["control_change"], loss["control"] - loss["original"], 0
    ):
        yield "loss.control_change is not control - original"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _sizes(manifest: Manifest, model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    before, after, layers = manifest["original"], manifest["factorized"], manifest["layers"]
    saved = {
        key: sum(layer[key] - layer[f"factorized_{key}"] for layer in layers)
        for key in ("parameters", "flops")
    }
    found = {
        "factorized.parameters": (after["parameters"], model_parameters(model)),
        "factorized.bytes": (
            after["bytes"],
            safetensors_bytes(tensors, METADATA),
        ),
        "original.flops - factorized.flops": (before["flops"] - after["flops"], saved["flops"]),
        "original.factorizable_parameters": (
            before["factorizable_parameters"],
            sum(layer["parameters"] for layer in layers),
        ),
        "factorized.factorizable_parameters": (
            after["factorizable_parameters"],
            sum(layer["factorized_parameters"] for layer in layers),
        ),
    }
    for name, (stated, computed) in found.items():
        if stated != computed:
            yield f"{name}: {stated} stated, {computed} found"
    share = after["parameters"] / before["parameters"] if before["parameters"] else math.nan
    if not math.isclose(manifest["ratio"], share, rel_tol=EXACT):
        yield f"ratio: {manifest['ratio']} stated, {share} found"
    for layer in layers:
        yield from _layer_sizes(layer, model)


def _layer_sizes(layer: Mapping[str, Any], model: nn.Module) -> Iterator[str]:
    name, shape = layer["name"], layer["shape"]
    inner = math.prod(shape[1:])
    found = {"parameters": math.prod(shape), "full_rank": min(shape[0] if shape else 0, inner)}
    try:
        module = model.get_submodule(name)
    except AttributeError:
        yield f"the model has no layer {name}"
        return
    weight = getattr(module, "weight", None)
    if isinstance(module, FactorizedLayer):
        sides: Tensor = module.dense_matrix()
        if [sides.shape[0], sides.shape[1:].numel()] != [*shape[:1], inner]:
            yield f"{name}: the shape {shape} is not that of its matrix, {tuple(sides.shape)}"
        parameters = module.named_parameters()
        own = [p for key, p in parameters if key.rpartition(".")[2] != "bias"]
        found["factorized_parameters"] = sum(parameter.numel() for parameter in own)
    elif isinstance(weight, Tensor) and layer["rank"] is None:
        if list(weight.shape) != shape:
            yield f"{name}: shape {shape} stated, {tuple(weight.shape)} found"
        found["factorized_parameters"] = weight.numel()
    for key, value in found.items():
        if layer[key] != value:
            yield f"{name} {key}: {layer[key]} stated, {value} found"
    if (layer["rank"] is None) != (layer.get("reason_dense") is not None):
        yield f"{name}: reason_dense is {layer.get('reason_dense')!r}"


def _counts(document: Document) -> Iterator[str]:
    """Examples that are listed, against the numbers of them that are told."""
    certificate, data, evidence = (document[k] for k in ("certificate", "data", "evidence"))
    part, seen = data["parts"]["held_out"], certificate["examples"]
    listed = {
        "data.held_out_examples": data["held_out_examples"],
        "data.held_out_answers": data["held_out_answers"],
    }
    if data["held_out_groups"] is not None:
        listed["data.held_out_groups"] = data["held_out_groups"]
    if evidence is not None:
        listed["evidence.terms"] = evidence["terms"]
    for name, values in listed.items():
        if len(values) != seen:
            yield f"{name} has {len(values)}, certificate.examples is {seen}"
    count = part["examples"]
    if certificate["test"] == "betting" and not document["statement"]["metric_margins"]:
        # It looks at the end of each of so many pieces, and stops once it is shown.
        piece = max(FEWEST, math.ceil(count / LOOKS))
        if seen > count or (seen != count and seen % piece):
            yield f"certificate.examples is {seen}, of {count} in looks after {piece} each"
    elif seen != count:
        yield f"certificate.examples is {seen}, data.parts.held_out.examples {count}"
    if seen == count and part["digest"] != certificate["data_digest"]:
        yield "data.parts.held_out.digest is not certificate.data_digest"
    for name, one in data["parts"].items():
        known = [n for n in one.get("left_out", {}).values() if n is not None]
        if "given" in one and one["given"] != one["examples"] + sum(known):
            yield f"data.parts.{name}: {one['given']} given are not those used and left out"


def _statement(manifest: Manifest, document: Document) -> Iterator[str]:
    """What was stated, against the settings and what selection data showed."""
    stated, settings = document["statement"], document["run"]["settings"]
    for name in ("confidence", "test"):
        if name in settings and settings[name] != stated[name]:
            yield f"{name}: {stated[name]!r} stated, {settings[name]!r} in run.settings"
    if settings.get("private", False) != (document["evidence"] is None):
        yield "the losses of single examples are there where run.settings says private, or not"
    accuracy = stated["metric_margins"].get("accuracy")
    if "accuracy_margin" in settings and settings["accuracy_margin"] != accuracy:
        yield f"accuracy's margin: {accuracy} stated, {settings['accuracy_margin']} in run.settings"
    largest = settings.get("largest_change")
    if (stated["range_from"] == "stated") != (largest is not None):
        yield f"range_from: {stated['range_from']!r}, with largest_change {largest} in run.settings"
    elif largest is not None and [stated["lowest"], stated["highest"]] != [-largest, largest]:
        yield f"range: {stated['lowest']} to {stated['highest']}, largest_change is {largest}"
    units = manifest["data"]["selection"]["examples"]
    seen = [
        (one.get("change"), one.get("standard_error"))
        for one in manifest.get("selection", [])
        if isinstance(one, Mapping)
    ]
    if not any(_is_of(stated, *one, units) for one in seen):
        yield "expected and deviation are those of no plan in selection"


def _is_of(stated: Mapping[str, Any], change: Any, error: Any, units: int) -> bool:
    """Whether a plan's change on selection data is the one that a statement was made from."""
    numbers = [value for value in (change, error) if isinstance(value, int | float)]
    if len(numbers) < 2:
        return bool(stated["expected"] == 0.0)
    near = _near(stated["expected"], numbers[0], 0)
    return near and math.isclose(
        stated["deviation"], numbers[1] * math.sqrt(units), rel_tol=1e-6, abs_tol=1e-12
    )


def _history(document: Document) -> Check:
    """Earlier openings, against the record of this machine, where it has this one."""
    what, history, models = "earlier openings", document["data"]["history"], document["models"]
    keys = ("others", "lossless", "shared")
    stated = [history[key] for key in keys]
    if stated[1] > stated[0] or (stated[0] == 0) != (stated[2] == 0):
        return Check(what, "differs", "their numbers don't go together")
    try:
        found = recorded_before(models["original"], models["factorized"])
    except OSError as error:
        return Check(what, "not checked", f"the record on this machine can't be read: {error}")
    if not found:
        return Check(what, "not checked", "the record on this machine has no opening for the model")
    known = [[getattr(one, key) for key in keys] for one in found]
    if stated in known:
        return Check(what, "agrees")
    if history.get("trouble") is not None:
        return Check(what, "not checked", str(history["trouble"]))
    told = f"{stated[0]} stated, {known[-1][0]} on the record of this machine"
    return Check(what, "differs", f"{told} (shown lossless or better: {stated[1]}, {known[-1][1]})")
