"""Where the losses of a model come from, whatever holds the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from rankfold.data.parts import Part
from rankfold.files.digests import tensors_digest
from rankfold.machine.progress import Progress
from rankfold.model.sizes import stored_tensors
from rankfold.tasks.evaluation import Evaluation, evaluate
from rankfold.tasks.losses import Task
from rankfold.tasks.repeated import refuse_random


@dataclass(frozen=True)
class Identity:
    """Which model a certificate speaks of.

    Attributes:
        kind: How the model was given: ``folder``, ``onnx``, ``endpoint`` and the like.
        name: What the user called it, without the folders above it.
        digest: SHA-256 of its weights, or of what is known of it where they are not seen.
        weights_seen: Whether the digest is of its weights.
    """

    kind: str
    name: str
    digest: str
    weights_seen: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


class LossSource(Protocol):
    """Gives the losses of one model.

    Attributes:
        identity: Which model it is.
        task: Name of the task.
        unit: Of the losses.
    """

    identity: Identity
    task: str
    unit: str

    def check(self, part: Part) -> None:
        """Refuse what can't be compared, by a few examples of a part that may be seen."""
        ...

    def losses(self, part: Part, progress: Progress, stage: str, *, finite: bool) -> Evaluation:
        """Losses of every example of a part; ``finite`` refuses those that are not."""
        ...


class OfModule:
    """Losses of a module of torch, or of what is called like one."""

    def __init__(
        self, identity: Identity, model: nn.Module, task: Task, batch_size: int | None
    ) -> None:
        """Compute losses of ``task`` in batches of ``batch_size`` examples."""
        self.identity, self.task, self.unit = identity, task.name, task.unit
        self._model, self._task, self._batch_size = model, task, batch_size

    def check(self, part: Part) -> None:
        """Refuse a model that gives something else each time.

        Raises:
            InputError: It does, or can't run on the data.
        """
        refuse_random(self._model, self._task, part)

    def losses(self, part: Part, progress: Progress, stage: str, *, finite: bool) -> Evaluation:
        """As of ``evaluate``."""
        return evaluate(
            self._model,
            self._task,
            part,
            batch_size=self._batch_size,
            progress=progress,
            stage=stage,
            finite=finite,
        )


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a model's tensors; of a quantized one, of the tensors that it is stored as."""
    found: dict[str, Tensor] = {}
    for name, tensor in stored_tensors(model)[0].items():
        found |= _plain(name, tensor)
    return tensors_digest(found)


def _plain(name: str, tensor: Any) -> dict[str, Tensor]:
    """A tensor, or those that a tensor of another class is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return {name: tensor}
    names, _ = tensor.__tensor_flatten__()
    found: dict[str, Tensor] = {}
    for inner in names:
        found |= _plain(f"{name}.{inner}", getattr(tensor, inner))
    return found
