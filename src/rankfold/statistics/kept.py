"""Statistics in a folder: for other runs of the same model and data, and to be merged.

``statistics.safetensors`` holds the Grams and gradients, ``statistics.json`` what they are of: the
model's digest, those of all examples, the settings that decide what is collected. What is of
something else is refused by name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from rankfold.errors import InputError, visible
from rankfold.files.checked import Count, Digest, Fields, Number, Word, check
from rankfold.files.digests import tensors_digest
from rankfold.files.folder import check_output, folder_in_one_step
from rankfold.files.json_file import read_json
from rankfold.files.own_files import check_own_files
from rankfold.files.tensors import METADATA, read_tensors
from rankfold.machine.offload import Offload
from rankfold.maths.linalg import Damping, rows_of_same_gram
from rankfold.model.layer_matrix import MatrixLayer, kept_dtype, matrix_shape
from rankfold.statistics.labels import Curvature
from rankfold.statistics.layer_statistics import DominantRows, LayerStatistics

FORMAT = 1
JSON_FILE, TENSORS_FILE = "statistics.json", "statistics.safetensors"


class _Layer(Fields):
    shares_input_with: str | None
    lacking: tuple[Number, Number]
    rows: Count
    terms: tuple[Number, Number, Number]


class _Document(Fields):
    format: Count
    rankfold: Word
    model: Digest
    examples: list[Digest]
    settings: dict[str, Any]
    curvature: Word | None
    calibration_loss: Number
    terms: Number
    layers: dict[str, _Layer]
    digest: Digest


@dataclass(frozen=True)
class KeptStatistics:
    """Statistics, and what they are of.

    Attributes:
        model: The model's digest.
        examples: Those of the calibration examples.
        settings: What decides what is collected.
        curvature: Where B comes from.
        calibration_loss: Mean loss of some examples.
        terms: Of the loss, in all passes together.
        layers: By layer.
        uses: Sums of the uses of embedding matrices (``EmbeddingRecorder.tensors``).
    """

    model: str
    examples: list[str]
    settings: dict[str, Any]
    curvature: Curvature | None
    calibration_loss: float
    terms: float
    layers: dict[str, LayerStatistics]
    uses: dict[str, Tensor]

    def save(self, folder: Path, reads: Iterable[Path] = ()) -> None:
        """Write them to a folder that is new or empty.

        Raises:
            InputError: It can't be written.
        """
        check_new(folder, reads)
        tensors = _tensors(self)
        document = {
            "format": FORMAT,
            "rankfold": version("rankfold"),
            "torch": torch.__version__,
            "model": self.model,
            "examples": self.examples,
            "settings": self.settings,
            "curvature": self.curvature,
            "calibration_loss": self.calibration_loss,
            "terms": self.terms,
            "layers": {name: _described(one) for name, one in self.layers.items()},
            "digest": tensors_digest(tensors),
        }
        with folder_in_one_step(folder, overwrite=False) as draft:
            save_file(tensors, draft / TENSORS_FILE, metadata=METADATA)
            (draft / JSON_FILE).write_text(json.dumps(document, indent=1, allow_nan=False))

    def check_of(self, folder: Path, other: KeptStatistics) -> None:
        """Refuse statistics of another model, other settings or another way to collect them.

        Args:
            folder: Of these, for the message.
            other: What they should be of; its examples and layers are not looked at.

        Raises:
            InputError: Names what differs.
        """
        named = f"the statistics in {visible(folder)}"
        if self.model != other.model:
            raise InputError(
                f"{named} are of another model: its weights have the digest {self.model[:12]}, "
                f"here it is {other.model[:12]}. Collect them again, or open the model that they "
                "are of."
            )
        for name, value in other.settings.items():
            if self.settings.get(name) != value:
                raise InputError(
                    f"{named} were collected with {name} {_shown(self.settings.get(name))}, here "
                    f"it is {_shown(value)}. Collect them again, or ask for what they are of."
                )

    def check_examples(self, folder: Path, examples: Sequence[str]) -> None:
        """Refuse statistics of other calibration examples.

        Raises:
            InputError: Says how many are the same.
        """
        here, there = Counter(examples), Counter(self.examples)
        if here != there:
            raise InputError(
                f"the statistics in {visible(folder)} are of other data: of their "
                f"{len(self.examples)} calibration examples {(here & there).total()} are among "
                f"the {len(examples)} of this run. Give the data that they were collected on, "
                "with the same limit= and seed=."
            )

    def checked(
        self, folder: Path, layers: Mapping[str, MatrixLayer], offload: Offload
    ) -> dict[str, LayerStatistics]:
        """The statistics of these layers, where those of all lie.

        Raises:
            InputError: One doesn't fit its layer.
        """
        kept: dict[int, Tensor] = {}

        def keep(values: Tensor | None, of: MatrixLayer, what: str, *shapes: Any) -> Any:
            if values is None:
                return None
            if tuple(values.shape) not in shapes or values.dtype != kept_dtype(of.weight):
                raise InputError(
                    f"{visible(folder)} is damaged: {what} is {tuple(values.shape)}, "
                    f"{values.dtype}; expected {' or '.join(map(str, shapes))}, "
                    f"{kept_dtype(of.weight)}. Collect the statistics again."
                )
            if id(values) not in kept:
                kept[id(values)] = offload.kept(values)
            return kept[id(values)]

        found: dict[str, LayerStatistics] = {}
        for name, one in self.layers.items():
            if name not in layers:
                raise InputError(
                    f"the statistics in {visible(folder)} are of a layer {visible(name)}, which "
                    "can't be factorized here. Collect them again."
                )
            layer = layers[name]
            out, in_ = matrix_shape(layer)
            gradients = None
            if one.gradients is not None:
                both = [keep(g, layer, f"a gradient of {name}", (out, in_)) for g in one.gradients]
                gradients = both[0], both[1]
            found[name] = LayerStatistics(
                keep(one.input_gram, layer, f"the Gram of {name}'s inputs", (in_, in_), (in_,)),
                keep(one.output_gram, layer, f"the Gram of {name}'s gradients", (out, out), (out,)),
                gradients,
                one.shares_input_with,
                one.dominant,
                one.lacking,
                keep(one.product, layer, f"the product of {name}", (out, out), (in_, in_)),
                one.rows,
                one.terms,
            )
        return found


def check_new(folder: Path, reads: Iterable[Path] = ()) -> None:
    """Refuse a folder that statistics can't be written to; none is written over.

    Raises:
        InputError: As said.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            f"the output folder {visible(folder)} exists and is not empty; choose another one."
        )
    check_output(folder, False, JSON_FILE, reads=reads)


def read_kept(folder: Path) -> KeptStatistics:
    """The statistics in a folder.

    Raises:
        InputError: There are none, or they are damaged.
    """
    file = folder / JSON_FILE
    if not file.is_file():
        raise InputError(
            f"{visible(folder)} holds no {JSON_FILE}; expected a folder that rankfold statistics "
            "has written."
        )
    check_own_files(folder, [file, folder / TENSORS_FILE])
    document = read_json(file)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InputError(
            f"{visible(file)} is of another format than {FORMAT}, which is read here. Collect the "
            "statistics again."
        )
    check(document, _Document, file)
    tensors = read_tensors(folder / TENSORS_FILE)
    if tensors_digest(tensors) != document["digest"]:
        raise InputError(
            f"{visible(folder)} is damaged: {TENSORS_FILE} is not what {JSON_FILE} was written "
            "with. Copy the folder again, or collect the statistics again."
        )
    try:
        layers = {name: _read(name, one, tensors) for name, one in document["layers"].items()}
    except KeyError as error:
        raise InputError(
            f"{visible(folder)} is damaged: {TENSORS_FILE} has no {visible(error.args[0])}. "
            "Collect the statistics again."
        ) from error
    return KeptStatistics(
        document["model"],
        document["examples"],
        document["settings"],
        cast("Curvature | None", document["curvature"]),
        document["calibration_loss"],
        document["terms"],
        layers,
        {n.removeprefix("use "): t for n, t in tensors.items() if n.startswith("use ")},
    )


def merged(found: Mapping[Path, KeptStatistics]) -> KeptStatistics:
    """Statistics of the data of all of them together.

    Grams and gradients are those of one pass over all examples, to rounding. What a half of the
    examples lacks (``shrinkage``) is the mean of what it lacks in each.

    Raises:
        InputError: They are of different models or settings, or two have an example in common.
    """
    (first_folder, first), *others = found.items()
    examples = list(first.examples)
    for folder, one in others:
        one.check_of(folder, first)
        if one.curvature != first.curvature or one.layers.keys() - first.layers.keys():
            differs = "curvature" if one.curvature != first.curvature else "layers"
            raise InputError(
                f"the statistics in {visible(folder)} and in {visible(first_folder)} differ in "
                f"their {differs}. Collect them with the same settings, such as "
                "curvature='empirical'."
            )
        if both := set(examples) & set(one.examples):
            raise InputError(
                f"{visible(folder)} has {len(both)} of the examples that were collected before "
                "it: each example counts once. Give statistics of different data."
            )
        examples += one.examples
    every = list(found.values())
    terms = sum(one.terms for one in every)
    return KeptStatistics(
        first.model,
        examples,
        first.settings,
        first.curvature,
        sum(one.calibration_loss * one.terms for one in every) / terms,
        terms,
        _merged_layers(every),
        {use: torch.stack([one.uses[use] for one in every]).sum(0) for use in first.uses},
    )


def _merged_layers(every: Sequence[KeptStatistics]) -> dict[str, LayerStatistics]:
    found: dict[str, LayerStatistics] = {}
    grams: dict[tuple[int, ...], Tensor] = {}
    for name in every[0].layers:
        seen = [one.layers[name] for one in every if name in one.layers]
        key = tuple(id(one.input_gram) for one in seen)
        if key not in grams:
            grams[key] = _mean([s.input_gram for s in seen], [s.rows for s in seen])
        found[name] = _merged_layer(seen, grams[key], every)
    return found


def _merged_layer(
    seen: Sequence[LayerStatistics], gram: Tensor, every: Sequence[KeptStatistics]
) -> LayerStatistics:
    """Of one layer; sums of terms count those of data that never reached it."""
    first, all_terms = seen[0], sum(one.terms for one in every)
    terms = [sum(one.terms) for one in seen]
    of_halves = cast(
        "tuple[float, float, float]", tuple(map(sum, zip(*[s.terms for s in seen], strict=True)))
    )
    output = product = gradients = dominant = None
    if first.output_gram is not None:
        output = _mean([cast("Tensor", one.output_gram) for one in seen], terms, all_terms)
    if first.product is not None:
        products = [cast("Tensor", one.product) for one in seen]
        by_rows = first.input_gram.dim() == 1
        product = _mean(
            products, [s.rows for s in seen] if by_rows else terms, None if by_rows else all_terms
        )
    if first.gradients is not None:
        both = [
            _mean(
                [cast("tuple[Tensor, Tensor]", one.gradients)[half] for one in seen],
                [one.terms[half] for one in seen],
            )
            for half in (0, 1)
        ]
        gradients = both[0], both[1]
    rows = [(one.dominant, count) for one, count in zip(seen, terms, strict=True) if one.dominant]
    if rows:
        scaled = [d.inputs * (count / all_terms) ** 0.5 for d, count in rows]
        squares = [d.output_squares * (count / all_terms) for d, count in rows]
        dominant = DominantRows(rows_of_same_gram(torch.cat(scaled)), torch.stack(squares).sum(0))
    weights = [count / sum(terms) for count in terms]
    return LayerStatistics(
        gram,
        output,
        gradients,
        first.shares_input_with,
        dominant,
        Damping(
            sum(one.lacking.input * w for one, w in zip(seen, weights, strict=True)),
            sum(one.lacking.output * w for one, w in zip(seen, weights, strict=True)),
        ),
        product,
        sum(one.rows for one in seen),
        of_halves,
    )


def _mean(values: Sequence[Tensor], counts: Sequence[float], total: float | None = None) -> Tensor:
    """The mean weighted by counts, summed in float64."""
    pairs = zip(values, counts, strict=True)
    added = sum(value.double() * count for value, count in pairs)
    return (cast("Tensor", added) / (total or max(1, sum(counts)))).to(values[0].dtype)


def _tensors(kept: KeptStatistics) -> dict[str, Tensor]:
    """What the file holds; a Gram that several layers share stands under the first one's name."""
    found: dict[str, Tensor | None] = {f"use {name}": value for name, value in kept.uses.items()}
    for name, one in kept.layers.items():
        if one.shares_input_with is None:
            found[f"{name} input_gram"] = one.input_gram
        found[f"{name} output_gram"], found[f"{name} product"] = one.output_gram, one.product
        for half, gradient in enumerate(one.gradients or ()):
            found[f"{name} gradient {half}"] = gradient
        if one.dominant is not None:
            found[f"{name} dominant inputs"] = one.dominant.inputs
            found[f"{name} dominant output_squares"] = one.dominant.output_squares
    return {name: value.cpu().contiguous() for name, value in found.items() if value is not None}


def _described(one: LayerStatistics) -> dict[str, Any]:
    return {
        "shares_input_with": one.shares_input_with,
        "lacking": [float(share) for share in one.lacking],
        "rows": one.rows,
        "terms": [float(count) for count in one.terms],
    }


def _read(name: str, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LayerStatistics:
    leader = about["shares_input_with"] or name
    gradients = dominant = None
    if f"{name} gradient 0" in tensors:
        gradients = tensors[f"{name} gradient 0"], tensors[f"{name} gradient 1"]
    if f"{name} dominant inputs" in tensors:
        squares = tensors[f"{name} dominant output_squares"]
        dominant = DominantRows(tensors[f"{name} dominant inputs"], squares)
    first, second, third = about["terms"]
    return LayerStatistics(
        tensors[f"{leader} input_gram"],
        tensors.get(f"{name} output_gram"),
        gradients,
        about["shares_input_with"],
        dominant,
        Damping(*about["lacking"]),
        tensors.get(f"{name} product"),
        about["rows"],
        (first, second, third),
    )


def _shown(value: object) -> str:
    text = json.dumps(value)
    return visible(text if len(text) <= 60 else f"{text[:60]}...")
