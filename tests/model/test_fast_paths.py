"""The invariant: a model with exchanged layers computes what the original's slow path computes, for
every module of ``torch.nn`` that holds a weight, trained or not, with and without masks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankfold
from rankfold import InputError
from rankfold.forms.factors import Factors
from rankfold.forms.low_rank.fit import low_rank_module
from rankfold.model.find_layers import find_layers
from rankfold.model.layer_matrix import weight_matrix
from rankfold.model.replace import with_replaced
from rankfold.model.unpack import unpack
from tests.small_models import seeded

N, LENGTH, DIM = 3, 5, 8


class Net(nn.Module):
    """A module between two layers that can be factorized whatever it is."""

    def __init__(self, part: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.before = nn.Linear(DIM, DIM)
        self.part = part
        self.call = call
        self.after = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, **masks: Tensor) -> Tensor:
        out = self.call(self.part, self.before(x), **masks)
        return self.after(out.tanh()) if out.shape[-1:] == (DIM,) else out


def _called(part: nn.Module, x: Tensor) -> Tensor:
    return part(x)


def _first(part: nn.Module, x: Tensor) -> Tensor:
    return part(x)[0]


def _image(part: nn.Module, x: Tensor) -> Tensor:
    return part(x.transpose(1, 2)[..., None].expand(-1, -1, -1, 4))


def _volume(part: nn.Module, x: Tensor) -> Tensor:
    return part(x.transpose(1, 2)[..., None, None].expand(-1, -1, -1, 4, 4))


def _row(part: nn.Module, x: Tensor) -> Tensor:
    return part(x.transpose(1, 2))


def _ids(part: nn.Module, x: Tensor) -> Tensor:
    return part((x[..., 0] > 0).long() + 2 * (x[..., 1] > 0).long())


def _labels(x: Tensor) -> Tensor:
    return (x.sum(-1) > 0).long().flatten()


def _attends(part: nn.Module, x: Tensor, mask: Any = None, pad: Any = None) -> Tensor:
    return part(x, x, x, key_padding_mask=pad, attn_mask=mask, need_weights=False)[0]


def _attends_weighed(part: nn.Module, x: Tensor, mask: Any = None, pad: Any = None) -> Tensor:
    out, weights = part(x, x, x, key_padding_mask=pad, attn_mask=mask)
    return out + weights.sum(-1, keepdim=True)


def _encodes(part: nn.Module, x: Tensor, mask: Any = None, pad: Any = None) -> Tensor:
    return part(x, mask, src_key_padding_mask=pad)


def _decodes(part: nn.Module, x: Tensor, mask: Any = None, pad: Any = None) -> Tensor:
    return part(x, x, tgt_mask=mask, tgt_key_padding_mask=pad, memory_key_padding_mask=pad)


def _transforms(part: nn.Module, x: Tensor, mask: Any = None, pad: Any = None) -> Tensor:
    return part(x, x, src_mask=mask, src_key_padding_mask=pad, memory_key_padding_mask=pad)


def _reads_packed(part: nn.Module, x: Tensor) -> Tensor:
    """As models do that give the weights of attention to torch's function themselves."""
    held: Any = part
    return nn.functional.multi_head_attention_forward(
        x, x, x, DIM, 2, held.in_proj_weight, held.in_proj_bias, None, None, False, 0.0,
        held.out_proj.weight, held.out_proj.bias, need_weights=False,
    )[0]  # fmt: skip


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(DIM, 2, 16, 0.0, batch_first=True, **options)


PLAIN: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "Linear": (lambda: nn.Linear(DIM, DIM), _called),
    "Bilinear": (lambda: nn.Bilinear(DIM, DIM, DIM), lambda part, x: part(x, x)),
    "Conv1d": (lambda: nn.Conv1d(DIM, DIM, 3, padding=1), _row),
    "Conv2d": (lambda: nn.Conv2d(DIM, DIM, 3, padding=1), _image),
    "Conv3d": (lambda: nn.Conv3d(DIM, DIM, 3, padding=1), _volume),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(DIM, DIM, 3), _row),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(DIM, DIM, 3), _image),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(DIM, DIM, 3), _volume),
    "Embedding": (lambda: nn.Embedding(4, DIM), _ids),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(4, DIM), _ids),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(DIM), _row),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(DIM), _image),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(DIM), _volume),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(DIM, affine=True), _row),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(DIM, affine=True), _image),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(DIM, affine=True), _volume),
    "GroupNorm": (lambda: nn.GroupNorm(2, DIM), _row),
    "LayerNorm": (lambda: nn.LayerNorm(DIM), _called),
    "RMSNorm": (lambda: nn.RMSNorm(DIM), _called),
    "PReLU": (lambda: nn.PReLU(), _called),
    "RNN": (lambda: nn.RNN(DIM, DIM, batch_first=True), _first),
    "GRU": (lambda: nn.GRU(DIM, DIM, batch_first=True), _first),
    "LSTM": (lambda: nn.LSTM(DIM, DIM, batch_first=True, proj_size=4), _first),
    "RNNCell": (lambda: nn.RNNCell(DIM, DIM), lambda part, x: part(x[:, 0])),
    "GRUCell": (lambda: nn.GRUCell(DIM, DIM), lambda part, x: part(x[:, 0])),
    "LSTMCell": (lambda: nn.LSTMCell(DIM, DIM), lambda part, x: part(x[:, 0])[0]),
    "AdaptiveLogSoftmaxWithLoss": (
        lambda: nn.AdaptiveLogSoftmaxWithLoss(DIM, 9, [2, 4], 2),
        lambda part, x: part(x.flatten(0, 1), _labels(x)).output,
    ),
    "LinearCrossEntropyLoss": (
        lambda: nn.LinearCrossEntropyLoss(DIM, 4),
        lambda part, x: part(x.flatten(0, 1), _labels(x)),
    ),
    "MultiheadAttention-read": (lambda: nn.MultiheadAttention(DIM, 2), _reads_packed),
    "MultiheadAttention-read-no-bias": (
        lambda: nn.MultiheadAttention(DIM, 2, bias=False), _reads_packed,
    ),
}  # fmt: skip
MASKED: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "MultiheadAttention": (lambda: nn.MultiheadAttention(DIM, 2, batch_first=True), _attends),
    "MultiheadAttention-weights": (
        lambda: nn.MultiheadAttention(DIM, 2, batch_first=True), _attends_weighed,
    ),
    "TransformerEncoderLayer": (layer, _encodes),
    "TransformerEncoderLayer-norm-first": (lambda: layer(norm_first=True), _encodes),
    "TransformerEncoderLayer-no-bias": (lambda: layer(bias=False), _encodes),
    "TransformerEncoder": (lambda: nn.TransformerEncoder(layer(), 2), _encodes),
    "TransformerEncoder-norm": (
        lambda: nn.TransformerEncoder(layer(activation="gelu"), 2, nn.LayerNorm(DIM)), _encodes,
    ),
    "TransformerEncoder-unchecked": (
        lambda: nn.TransformerEncoder(layer(), 2, mask_check=False), _encodes,
    ),
    "TransformerDecoderLayer": (
        lambda: nn.TransformerDecoderLayer(DIM, 2, 16, 0.0, batch_first=True), _decodes,
    ),
    "TransformerDecoder": (
        lambda: nn.TransformerDecoder(
            nn.TransformerDecoderLayer(DIM, 2, 16, 0.0, batch_first=True), 2
        ),
        _decodes,
    ),
    "Transformer": (
        lambda: nn.Transformer(DIM, 2, 1, 1, 16, 0.0, batch_first=True), _transforms,
    ),
}  # fmt: skip
PAD = torch.arange(LENGTH).expand(N, LENGTH) >= torch.tensor([[5], [3], [4]])
HOLES = torch.tensor([[0, 0, 0, 0, 0], [1, 0, 0, 1, 0], [0, 1, 0, 0, 0]], dtype=torch.bool)
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "padding": {"pad": PAD},
    "float-padding": {"pad": torch.zeros(N, LENGTH).masked_fill(PAD, -torch.inf)},
    "holes": {"pad": HOLES},
    "causal": {"mask": CAUSAL},
    "both": {"mask": CAUSAL, "pad": PAD},
}


def test_no_module_of_torch_that_holds_a_weight_is_forgotten() -> None:
    names = {name.partition("-")[0] for name in (*PLAIN, *MASKED)}
    lazy = {name for name in dir(nn) if name.startswith("Lazy")}
    for name in set(dir(nn)) - names - lazy - {"SyncBatchNorm"}:
        kind = getattr(nn, name)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            continue
        for arguments in ((), (8,), (8, 8), (8, 8, 3), (8, 9, [2])):
            try:
                made = kind(*arguments)
            except Exception:  # it takes others
                continue
            assert not [*made.parameters()], name


@contextmanager
def slow_path() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def factorized(model: nn.Module) -> nn.Module:
    """With every layer as two factors of full rank."""
    new: dict[str, nn.Module] = {}
    for name, found in find_layers(model)[0].items():
        u, s, v = torch.linalg.svd(weight_matrix(found), full_matrices=False)
        new[name] = low_rank_module(found, Factors(u * s, v, None))
    assert new
    return with_replaced(model, new)


def check(model: nn.Module, masks: dict[str, Tensor]) -> None:
    x = torch.randn(N, LENGTH, DIM, generator=torch.Generator().manual_seed(1)).double()
    masks = {key: m.double() if m.is_floating_point() else m for key, m in masks.items()}
    for training in (False, True):
        model.train(training)
        plain = unpack(model).model
        for grad in (False, True):
            with torch.set_grad_enabled(grad), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, of masks of two kinds
                with slow_path():
                    wanted = copy.deepcopy(model)(x, **masks)
                for other in (plain, factorized(plain)):
                    assert other.part.training is training
                    found = copy.deepcopy(other)(x, **masks)
                    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PLAIN)
def test_every_module_that_holds_a_weight(name: str) -> None:
    make, call = PLAIN[name]
    check(seeded(2, lambda: Net(make(), call)).double(), {})


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("name", MASKED)
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nest")
def test_every_module_that_takes_masks(name: str, masks: str) -> None:
    make, call = MASKED[name]
    check(seeded(2, lambda: Net(make(), call)).double(), MASKS[masks])


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nest")
@pytest.mark.parametrize("masks", ["none", "padding"])
def test_an_encoder_that_is_the_whole_model(masks: str) -> None:
    model = seeded(2, lambda: nn.TransformerEncoder(layer(), 2)).double().eval()
    x = torch.randn(N, LENGTH, DIM).double()
    pad = MASKS[masks].get("pad")
    with torch.no_grad(), slow_path():
        wanted = model(x, src_key_padding_mask=pad)
    with torch.no_grad():
        found = factorized(unpack(model).model)(x, src_key_padding_mask=pad)
    torch.testing.assert_close(found, wanted)


class Classifier(nn.Module):
    """Of padded sequences; ``careful`` leaves hidden positions out of the mean."""

    def __init__(self, careful: bool, nested: bool = True) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(layer(), 2, enable_nested_tensor=nested)
        self.head = nn.Linear(DIM, 4)
        self.careful = careful

    def forward(self, x: Tensor) -> Tensor:
        hidden = x[..., 0] == 0
        out = self.encoder(x, src_key_padding_mask=hidden)
        if self.careful:
            out = out.masked_fill(hidden[..., None], 0)
        return self.head(out.sum(1))


def padded(count: int) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(5)
    examples = []
    for place in range(count):
        x = torch.randn(LENGTH, DIM, generator=generator)
        x[2 + place % 4 :] = 0
        examples.append((x, place % 4))
    return examples


@pytest.mark.filterwarnings("ignore:The PyTorch API of nest")
def test_a_verdict_holds_with_and_without_the_fast_path() -> None:
    examples = padded(90)
    model = seeded(4, lambda: Classifier(careful=True)).eval()
    data = rankfold.Data(examples[:40], examples[40:60], examples[60:])
    result = rankfold.lossless(model, data, size=0.8)
    x, labels = torch.stack([x for x, _ in examples[60:]]), [y for _, y in examples[60:]]
    with torch.no_grad():
        for name, one in (("original", model), ("factorized", result.model)):
            loss = nn.functional.cross_entropy(one(x), torch.tensor(labels))
            assert result.report["loss"][name] == pytest.approx(float(loss), abs=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()
    reads = seeded(4, lambda: Classifier(careful=False)).eval()
    with pytest.raises(InputError, match=r"with torch's fast path and .* src_key_padding_mask"):
        rankfold.lossless(reads, data, size=0.8)
    slow = seeded(4, lambda: Classifier(careful=False, nested=False)).eval()
    assert rankfold.lossless(slow, data, size=0.8).report["task"] == "classification"
