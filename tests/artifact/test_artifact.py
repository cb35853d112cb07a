import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import rankfold
from rankfold import ArtifactError, InputError
from rankfold.artifact.manifest import read_manifest, read_report
from rankfold.artifact.save import save_artifact
from rankfold.files import shards
from rankfold.integrations.transformers import load_folder
from tests.new_process import in_a_new_process
from tests.small_models import (
    SmallCNN,
    image_data,
    images,
    mlp,
    same_state,
    state,
    tiny_llama,
    token_data,
    token_windows,
    trained_cnn,
)

ROOT = Path(__file__).parents[2]
REOPEN = """
import sys
from pathlib import Path
import torch, rankfold
from safetensors.torch import load_file, save_file
from tests.small_models import SmallCNN
root = Path(sys.argv[1])
outputs = {}
for folder in sorted(p for p in root.iterdir() if p.is_dir()):
    inputs = load_file(root / f"{folder.name}.in")["inputs"]
    model = rankfold.load(folder, model=SmallCNN() if folder.name.startswith("cnn") else None)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        output = model(inputs)
    outputs[folder.name] = output if torch.is_tensor(output) else output.logits
save_file(outputs, root / "outputs.safetensors")
"""


def cnn_result(form: str = "pivoted") -> rankfold.Result:
    return rankfold.lossless(trained_cnn(), image_data(40), size=0.7, form=form)


def bfloat16_llama_from_disk(folder: Path) -> nn.Module:
    tiny_llama(torch.bfloat16).save_pretrained(folder)
    return load_folder(folder)


@pytest.fixture(scope="module")
def reopened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, ...]]:
    """Outputs of factorized models here, and of their artifacts in another process."""
    root, other = tmp_path_factory.mktemp("artifacts"), tmp_path_factory.mktemp("models")
    pixels, tokens = images(6, seed=31).tensors[0], torch.stack(token_windows(4, seed=32))
    llamas = {
        "llama_float32": tiny_llama(),
        "llama_bfloat16": bfloat16_llama_from_disk(other),
        "llama_cast_to_bfloat16": tiny_llama(torch.bfloat16),
    }
    results = {name: rankfold.lossless(m, token_data(), size=0.8) for name, m in llamas.items()}
    results |= {f"cnn_{form}": cnn_result(form) for form in ("pair", "pivoted")}
    here = {}
    for name, result in results.items():
        inputs = tokens if "llama" in name else pixels
        result.save(root / name)
        save_file({"inputs": inputs}, root / f"{name}.in")
        with torch.no_grad():
            output = result.model(inputs)
        here[name] = output if torch.is_tensor(output) else output.logits
    in_a_new_process(REOPEN, root, cwd=ROOT)
    there = load_file(root / "outputs.safetensors")
    return {name: (here[name], there[name]) for name in results}


@pytest.mark.processors
@pytest.mark.parametrize(
    "name",
    ["cnn_pair", "cnn_pivoted", "llama_float32", "llama_bfloat16", "llama_cast_to_bfloat16"],
)
def test_another_process_gets_the_same_bits(name: str, reopened: dict[str, Any]) -> None:
    here, there = reopened[name]
    assert here.dtype == there.dtype
    assert torch.equal(here, there)


def test_loaded_weights_are_the_saved_ones_and_tied_weights_stay_tied(tmp_path: Path) -> None:
    result = rankfold.lossless(tiny_llama(), token_data(), size=0.8)
    model = rankfold.load(result.save(tmp_path / "a"))
    assert same_state(model, state(result.model))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stored = load_file(tmp_path / "a" / "model.safetensors")
    assert "lm_head.weight" not in stored or "model.embed_tokens.weight" not in stored


def test_the_file_is_as_long_as_the_report_says(tmp_path: Path) -> None:
    result = cnn_result()
    folder = result.save(tmp_path / "a")
    assert (folder / "model.safetensors").stat().st_size == result.report["factorized"]["bytes"]


def test_the_manifest_holds_the_report_and_the_certificate(tmp_path: Path) -> None:
    result = cnn_result()
    manifest = read_report(result.save(tmp_path / "a"))
    assert manifest["certificate"] == result.certificate.as_dict()
    assert manifest["layers"] == result.report["layers"]
    assert manifest["versions"]["torch"] == torch.__version__


def test_saving_leaves_the_factorized_model_alone(tmp_path: Path) -> None:
    result = cnn_result()
    before = state(result.model)
    result.save(tmp_path / "a")
    assert same_state(result.model, before)


# Overwriting


def test_a_new_folder_is_made_with_its_parents_and_an_empty_one_is_used(tmp_path: Path) -> None:
    result = cnn_result()
    result.save(tmp_path / "new" / "deeper")
    (tmp_path / "empty").mkdir()
    result.save(tmp_path / "empty")
    for folder in (tmp_path / "new" / "deeper", tmp_path / "empty"):
        assert sorted(p.name for p in folder.iterdir()) == [
            "README.md",
            "certificate.json",
            "certificate.txt",
            "model.safetensors",
            "rankfold.json",
            "report.html",
            "seen.json",
        ]


def test_an_artifact_is_replaced_only_when_asked(tmp_path: Path) -> None:
    folder = cnn_result("pair").save(tmp_path / "a")
    (folder / "old.txt").write_text("from before")
    with pytest.raises(InputError, match=r"not empty.*overwrite"):
        cnn_result("pivoted").save(folder)
    assert read_manifest(folder)["settings"]["form"] == "pair"
    with pytest.raises(InputError, match=r"did not write there:\n  old\.txt"):
        cnn_result("pivoted").save(folder, overwrite=True)
    (folder / "old.txt").unlink()
    cnn_result("pivoted").save(folder, overwrite=True)
    assert read_manifest(folder)["settings"]["form"] == "pivoted"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_is_no_artifact_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"no rankfold\.json.*not overwritten"):
        cnn_result().save(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_file_is_no_output_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        cnn_result().save(tmp_path / "file", overwrite=True)
    with pytest.raises(InputError, match="can't be written"):
        cnn_result().save(tmp_path / "file" / "below")


# Writes that fail


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def failing(tensors: object, file: Path, metadata: object) -> None:
        Path(file).write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(shards, "save_file", failing)


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = cnn_result()
    fail_with(monkeypatch, OSError(28, "No space left on device"))
    with pytest.raises(InputError, match="No space left on device"):
        result.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = cnn_result()
    fail_with(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        result.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_overwrite_keeps_the_old_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    result = cnn_result()
    folder = result.save(tmp_path / "a")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    fail_with(monkeypatch, error)
    with pytest.raises((InputError, KeyboardInterrupt)):
        result.save(folder, overwrite=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]


def test_the_old_artifact_returns_when_the_last_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = cnn_result()
    folder = result.save(tmp_path / "a")

    def failing(one: Path, other: Path) -> bool:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("rankfold.files.owned.exchange", failing)
    with pytest.raises(InputError, match=r"Input/output error.*was saved in .*a-saved-1"):
        result.save(folder, overwrite=True)
    monkeypatch.undo()
    assert {one.name for one in tmp_path.iterdir()} == {"a", "a-saved-1"}
    rankfold.load(folder, SmallCNN())
    rankfold.load(tmp_path / "a-saved-1", SmallCNN())


def test_a_report_that_is_no_json_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        save_artifact(tmp_path / "a", mlp(), {"layers": [], "loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


# Damaged and foreign artifacts


@pytest.fixture(scope="module")
def good_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cnn_result().save(tmp_path_factory.mktemp("good") / "a")


@pytest.fixture
def folder(good_artifact: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for file in good_artifact.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def damage(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "rankfold.json"
    manifest = json.loads(file.read_text())
    edit(manifest)
    file.write_text(json.dumps(manifest))


def factorized(manifest: dict[str, Any]) -> dict[str, Any]:
    """The entry of a layer that was factorized."""
    return next(entry for entry in manifest["layers"] if entry["rank"] is not None)


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no version": (lambda m: m.pop("format_version"), "format_version None"),
    "version as text": (lambda m: m.update(format_version="1"), "format_version '1'"),
    "version 0": (lambda m: m.update(format_version=0), "format_version 0"),
    "newer version": (lambda m: m.update(format_version=2), "Install a newer rankfold"),
    "no model": (lambda m: m.pop("model"), "an object 'model'"),
    "model as list": (lambda m: m.update(model=[]), "an object 'model'"),
    "unknown kind": (lambda m: m["model"].update(kind="keras"), "model.kind"),
    "kind as list": (lambda m: m["model"].update(kind=["module"]), "model.kind"),
    "no class": (lambda m: m["model"].pop("class"), "model.class"),
    "no shared tensors": (lambda m: m["model"].pop("shared_tensors"), "shared_tensors"),
    "shared with 3": (lambda m: m["model"].update(shared_tensors={"a": 3}), "shared_tensors"),
    "shared with a missing one": (
        lambda m: m["model"].update(shared_tensors={"head.weight": "nowhere.weight"}),
        "nowhere.weight",
    ),
    "shared by a missing one": (
        lambda m: m["model"].update(shared_tensors={"nowhere.weight": "head.weight"}),
        "nowhere.weight",
    ),
    "version true": (lambda m: m.update(format_version=True), "format_version True"),
    "buffer of a list": (
        lambda m: m["model"].update(computed_buffers={"a": ["torch.float32"]}),
        "computed_buffers",
    ),
    "unpacked as object": (lambda m: m.update(unpacked={}), "a list of names 'unpacked'"),
    "unpacked module that is missing": (lambda m: m.update(unpacked=["../up"]), r"module \.\./up"),
    "unpacked module that can't be": (lambda m: m.update(unpacked=["head"]), "can't be unpacked"),
    "no layers": (lambda m: m.pop("layers"), "a list 'layers'"),
    "layers as object": (lambda m: m.update(layers={}), "a list 'layers'"),
    "layer as text": (lambda m: m["layers"].append("head"), "named layers"),
    "layer without a name": (lambda m: m["layers"][0].pop("name"), "named layers"),
    "layer without a rank": (lambda m: factorized(m).pop("rank"), "rank"),
    "rank 0": (lambda m: factorized(m).update(rank=0), "a positive rank"),
    "rank 1.5": (lambda m: factorized(m).update(rank=1.5), "a positive rank"),
    "rank true": (lambda m: factorized(m).update(rank=True), "a positive rank"),
    "rank as text": (lambda m: factorized(m).update(rank="3"), "a positive rank"),
    "rank too large": (lambda m: factorized(m).update(rank=10**6), r"ranks? \(?1000000"),
    "unknown form": (lambda m: factorized(m).update(form="cp"), "a form of"),
    "form as list": (lambda m: factorized(m).update(form=[]), "a form of"),
    "unknown layer": (lambda m: factorized(m).update(name="no.such"), "no.such is no such layer"),
    "layer that is no Linear": (
        lambda m: factorized(m).update(name="features.2"),
        "features.2 is a ReLU",
    ),
    "the whole model": (lambda m: factorized(m).update(name=""), "expected a Linear or Conv2d"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_manifest_is_refused(what: str, folder: Path) -> None:
    edit, message = DAMAGES[what]
    damage(folder, edit)
    with pytest.raises(InputError, match=message):
        rankfold.load(folder, SmallCNN())


@pytest.mark.parametrize("text", ["", "[1, 2]", "3", "null", "{", "{'a': 1}"])
def test_a_manifest_that_is_no_object_is_refused(text: str, folder: Path) -> None:
    (folder / "rankfold.json").write_text(text)
    with pytest.raises(InputError, match=r"rankfold.json"):
        rankfold.load(folder, SmallCNN())


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 10_000 + "}"])
def test_a_manifest_that_python_can_not_read_is_refused(text: str, folder: Path) -> None:
    (folder / "rankfold.json").write_text(text)
    with pytest.raises(InputError, match=r"rankfold\.json is not valid JSON"):
        rankfold.load(folder, SmallCNN())


def test_a_manifest_that_is_not_utf8_is_refused(folder: Path) -> None:
    (folder / "rankfold.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match="not valid JSON"):
        rankfold.load(folder, SmallCNN())


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda m: m.pop("certificate"), "required field `certificate`"),
        (lambda m: m["certificate"].update(verdict="great"), "certificate.verdict"),
        (lambda m: m["original"].update(bytes="many"), "original.bytes"),
        (lambda m: m["layers"][0].pop("full_rank"), r"layers\[0\]: .*`full_rank`"),
        (lambda m: m.update(not_factorized=[{}]), "not_factorized"),
        (lambda m: m.pop("accuracy"), "accuracy"),
    ],
)
def test_a_report_names_the_field_that_is_missing(
    edit: Callable[[dict[str, Any]], object], named: str, folder: Path
) -> None:
    damage(folder, edit)
    with pytest.raises(InputError, match=named):
        read_report(folder)


def test_a_folder_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"it has no rankfold.json"):
        rankfold.load(tmp_path)
    with pytest.raises(InputError, match=r"it has no rankfold.json"):
        rankfold.load(tmp_path / "missing")


def test_a_model_of_ones_own_must_be_given(good_artifact: Path) -> None:
    with pytest.raises(InputError, match=r"SmallCNN.*pass an instance"):
        rankfold.load(good_artifact)


def test_shapes_that_do_not_match_are_named_with_both(good_artifact: Path) -> None:
    with pytest.raises(InputError, match=r"features.0.*: \(8,\) in the file, \(9,\) in the model"):
        rankfold.load(good_artifact, SmallCNN(width=9))


def test_a_missing_and_an_extra_tensor_are_named(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["stranger"] = tensors.pop("head.bias")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"head.bias: missing\n.*stranger: not in the model"):
        rankfold.load(folder, SmallCNN())


def test_a_tensor_of_the_wrong_type_is_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["head.bias"] = tensors["head.bias"].to(torch.int32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"head.bias"):
        rankfold.load(folder, SmallCNN())


@pytest.mark.parametrize("length", [0, 4, 40, -1])
def test_a_truncated_weights_file_is_refused(length: int, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(InputError, match=r"model.safetensors can't be read"):
        rankfold.load(folder, SmallCNN())


def test_a_missing_weights_file_is_refused_and_no_pickle_read_instead(folder: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (folder / "executed",)

    for name in ("model.bin", "pytorch_model.bin", "model.pt", "rankfold.pkl"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    rankfold.load(folder, SmallCNN())
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model.safetensors can't be read"):
        rankfold.load(folder, SmallCNN())
    assert not (folder / "executed").exists()


def test_a_refused_artifact_leaves_the_given_model_as_it_was(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["head.bias"] = torch.zeros(99)
    save_file(tensors, folder / "model.safetensors")
    model = SmallCNN()
    before, printed = state(model), str(model)
    with pytest.raises(InputError, match=r"head.bias"):
        rankfold.load(folder, model)
    assert same_state(model, before)
    assert str(model) == printed


# What was changed on purpose, and what asks for too much


def test_other_weights_are_opened_only_where_that_is_asked_for(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["head.bias"] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"not those that were saved.*as_saved=False"):
        rankfold.load(folder, SmallCNN())
    model = rankfold.load(folder, SmallCNN(), as_saved=False)
    assert torch.equal(model.head.bias, tensors["head.bias"])


def test_an_artifact_of_before_there_were_digests_is_opened(folder: Path) -> None:
    whole = rankfold.load(folder, SmallCNN())
    damage(folder, lambda m: m.pop("digest"))
    assert same_state(rankfold.load(folder, SmallCNN()), state(whole))


def test_an_edited_configuration_is_opened_only_where_that_is_asked_for(tmp_path: Path) -> None:
    folder = rankfold.lossless(tiny_llama(), token_data(), size=0.8).save(tmp_path / "a")
    edit_config(folder, rms_norm_eps=0.5)
    with pytest.raises(ArtifactError, match=r"config\.json is not the file that was saved"):
        rankfold.load(folder)
    assert rankfold.load(folder, as_saved=False).config.rms_norm_eps == 0.5
    (folder / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"config\.json can't be read"):
        rankfold.load(folder)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"num_hidden_layers": 20_000}, "more than .* modules"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000"),
        ({"num_labels": 10**9}, "num_labels 1000000000"),
        ({"vocab_size": 10**9}, "asks for .* numbers"),
        ({"hidden_size": "wide"}, "can.t open .*config.json: .*hidden_size"),
    ],
)
def test_a_configuration_that_asks_for_far_more_than_its_weights_is_refused(
    asked: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = rankfold.lossless(tiny_llama(), token_data(), size=0.8).save(tmp_path / "a")
    edit_config(folder, **asked)
    with pytest.raises(ArtifactError, match=message):
        rankfold.load(folder, as_saved=False)


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def test_whoever_may_enter_the_folder_may_read_its_files(tmp_path: Path) -> None:
    cnn_result().save(tmp_path / "artifact")
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "artifact").iterdir()}
    assert set(modes.values()) == {0o644}, modes
