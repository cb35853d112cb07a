"""Statistics in a folder give what a pass gives, merge to those of all data, and are checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rankfold
from rankfold import Data, InputError
from rankfold.files.digests import tensors_digest
from rankfold.statistics.kept import JSON_FILE, TENSORS_FILE, merged, read_kept
from tests.small_models import (
    image_data,
    images,
    same_state,
    state,
    tiny_llama,
    token_data,
    token_windows,
    trained_cnn,
)

OPTIONS: dict[str, Any] = {"limit": 8, "embeddings": True, "effort": "fast", "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("kept") / "statistics"
    rankfold.save_statistics(tiny_llama(), token_data(), found, **OPTIONS)
    return found


def test_the_same_model_comes_of_them(folder: Path) -> None:
    expected = rankfold.lossless(tiny_llama(), token_data(), size=0.8, **OPTIONS)
    found = rankfold.lossless(tiny_llama(), token_data(), size=0.8, statistics=folder, **OPTIONS)
    assert same_state(found.model, state(expected.model))
    assert found.report == expected.report
    assert sorted(file.name for file in folder.iterdir()) == [JSON_FILE, TENSORS_FILE]


def test_they_are_written_the_same_each_time(folder: Path, tmp_path: Path) -> None:
    rankfold.save_statistics(tiny_llama(), token_data(), tmp_path / "again", **OPTIONS)
    for name in (JSON_FILE, TENSORS_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


OTHERS: dict[str, tuple[Callable[[], Any], Callable[[], Any], dict[str, Any], str]] = {
    "model": (
        lambda: tiny_llama(torch.float64), token_data, {}, "are of another model: .* digest"
    ),
    "data": (
        tiny_llama, lambda: Data(*(token_windows(12, seed) for seed in (1, 22, 23))), {},
        "of their 8 calibration examples 0 are among the 8 of this run",
    ),
    "fewer": (tiny_llama, token_data, {"limit": 6}, "8 calibration examples 6 are among the 6"),
    "seed": (tiny_llama, token_data, {"seed": 4}, "collected with seed 3, here it is 4"),
    "objective": (tiny_llama, token_data, {"objective": "kronecker"}, 'objective "joint", here it'),
    "effort": (tiny_llama, token_data, {"effort": "standard"}, "smaller_side true, here it is"),
    "layers": (tiny_llama, token_data, {"exclude": ["*mlp*"]}, "collected with layers"),
    "no data": (
        tiny_llama, token_data, {"objective": "svd", "embeddings": False}, "svd uses none"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_what_they_are_not_of_is_refused_by_name(case: str, folder: Path) -> None:
    model, data, options, message = OTHERS[case]
    with pytest.raises(InputError, match=message):
        rankfold.lossless(
            model(), data(), size=0.8, statistics=folder, **{**OPTIONS, **options}
        )  # fmt: skip


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]


def rewritten(folder: Path, change: Change) -> None:
    document = json.loads((folder / JSON_FILE).read_text())
    tensors = load_file(folder / TENSORS_FILE)
    change(document, tensors)
    document["digest"] = tensors_digest(tensors)
    save_file(tensors, folder / TENSORS_FILE)
    (folder / JSON_FILE).write_text(json.dumps(document))


FIRST = "model.layers.0.self_attn.q_proj"
DAMAGED: dict[str, tuple[Change, str]] = {
    "no Gram": (lambda _, t: t.pop(f"{FIRST} input_gram"), f"has no {FIRST} input_gram"),
    "shape": (
        lambda _, t: t.update({f"{FIRST} output_gram": torch.zeros(3, 3)}),
        r"the Gram of .*q_proj's gradients is \(3, 3\), torch.float32; expected \(32, 32\)",
    ),
    "use": (lambda _, t: t.pop("use model.embed_tokens gram"), "embed_tokens gram is missing"),
    "format": (lambda d, _: d.update(format=2), "of another format than 1"),
    "field": (lambda d, _: d.pop("examples"), "damaged: .*examples"),
    "rows": (lambda d, _: d["layers"][FIRST].update(rows="many"), "damaged: .*rows"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_ones_are_refused(case: str, folder: Path, tmp_path: Path) -> None:
    change, message = DAMAGED[case]
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in (JSON_FILE, TENSORS_FILE):
        (copy / name).write_bytes((folder / name).read_bytes())
    rewritten(copy, change)
    with pytest.raises(InputError, match=message):
        rankfold.lossless(tiny_llama(), token_data(), size=0.8, statistics=copy, **OPTIONS)


def test_other_bytes_and_no_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / JSON_FILE).write_bytes((folder / JSON_FILE).read_bytes())
    content = bytearray((folder / TENSORS_FILE).read_bytes())
    content[-1] ^= 1
    (copy / TENSORS_FILE).write_bytes(bytes(content))
    with pytest.raises(InputError, match=f"{TENSORS_FILE} is not what {JSON_FILE} was written"):
        read_kept(copy)
    with pytest.raises(InputError, match=f"holds no {JSON_FILE}; expected a folder that rankfold"):
        read_kept(tmp_path)
    with pytest.raises(InputError, match="exists and is not empty"):
        rankfold.save_statistics(tiny_llama(), token_data(), folder, **OPTIONS)


def parts_of_images(start: int, end: int) -> Data:
    whole, two, three = (images(90, seed) for seed in (11, 12, 13))
    return Data([whole[i] for i in range(start, end)], two, three)


@pytest.mark.parametrize("effort", ["fast", "standard"])
def test_merged_they_are_those_of_all_data(effort: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"effort": effort, "curvature": "empirical"}
    for name, start, end in (("a", 0, 40), ("b", 40, 90), ("all", 0, 90)):
        data = parts_of_images(start, end)
        rankfold.save_statistics(trained_cnn(), data, tmp_path / name, **options)
    rankfold.merge_statistics([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    found, expected = read_kept(tmp_path / "both"), read_kept(tmp_path / "all")
    assert sorted(found.examples) == sorted(expected.examples)
    assert found.terms == expected.terms == 90
    assert found.calibration_loss > 0
    for name, one in expected.layers.items():
        other = found.layers[name]
        assert other.rows == one.rows
        for what in ("input_gram", "output_gram", "product", "gradient"):
            values = getattr(one, what)
            if values is not None:
                # What dominates is kept apart, in either.
                close = torch.allclose(getattr(other, what), values, rtol=1e-4, atol=1e-7)
                assert close, (name, what)
    with_both = rankfold.lossless(
        trained_cnn(), parts_of_images(0, 90), size=0.7, statistics=tmp_path / "both", **options
    )
    assert with_both.report["layers"]


def test_what_does_not_belong_together_is_not_merged(folder: Path, tmp_path: Path) -> None:
    kept = read_kept(folder)
    with pytest.raises(InputError, match="has 8 of the examples that were collected before it"):
        merged({Path("one"): kept, Path("other"): kept})
    with pytest.raises(InputError, match="1 folders are to be merged; expected 2 or more"):
        rankfold.merge_statistics([folder], tmp_path / "out")
    rankfold.save_statistics(trained_cnn(), image_data(40), tmp_path / "cnn")
    with pytest.raises(InputError, match="cnn are of another model"):
        rankfold.merge_statistics([folder, tmp_path / "cnn"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
