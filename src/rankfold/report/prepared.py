"""What is known of a model before a size is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankfold.certificate.shown import listed_html
from rankfold.report.report import inspection
from rankfold.search.round import Round


@dataclass(frozen=True, repr=False)
class Prepared:
    """A model whose statistics are collected, as a person asks what it is."""

    _round: Round

    @property
    def sizes(self) -> dict[str, int]:
        """Of the original: parameters, those of factorizable layers, bytes, FLOPs an example."""
        return self._round.study.subject.sizes

    def inspect(self) -> list[dict[str, Any]]:
        """What is known of each layer: shape, full rank, predicted change by rank."""
        return inspection(self._round)

    def _known(self) -> dict[str, str]:
        study, sizes = self._round.study, self.sizes
        layers = len(study.subject.matrices)
        return {
            "model": type(study.subject.unpacked.given).__name__,
            "parameters": f"{sizes['parameters']:,}, {sizes['factorizable_parameters']:,} of them "
            f"in {layers} layers that can be factorized",
            "task": study.task.name,
            "data": ", ".join(
                f"{len(part.examples):,} {name.replace('_', '-')} examples"
                for name, part in study.parts.items()
            ),
        }

    def __repr__(self) -> str:
        known = self._known()
        model = known.pop("model")
        told = "; ".join(f"{name}: {value}" for name, value in known.items())
        return f"<Preparation of {model}; {told}>"

    def _repr_html_(self) -> str:
        return listed_html("Prepared: lossless(size) and compact() make it smaller", self._known())
