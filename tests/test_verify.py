"""Certificates as a user checks them, and attempts to cheat, on the command line."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rankfold.certificate.document import document_digest, evidence_digest, files
from rankfold.errors import InputError
from rankfold.verify import verify
from tests.command_line import OTHER_PROCESSORS, images, make_project, rankfold
from tests.tiny_language_model import TEXT, save_tiny_llama

NET = ("net.py:net", "--weights", "net.safetensors")
DATA = ("--data", "data.npz")
LOSSLESS = ("lossless", *NET, *DATA, "--size", "0.6", "--out", "out")
VERIFY = ("verify", "out", *DATA, "--model", *NET)


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("certified"))
    rankfold(*LOSSLESS, cwd=folder)
    return folder


@pytest.fixture
def work(certified: Path, tmp_path: Path) -> Path:
    """A copy of the user's folder with a certified model in it."""
    shutil.copytree(certified, tmp_path / "work", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "work"


def document(work: Path) -> dict[str, Any]:
    return json.loads((work / "out" / "certificate.json").read_text())


# Nothing gives again what only the run knows; each test has a record of openings of its own.
LEFT = ("what only the run knows", "earlier openings")


def checks(stdout: str) -> dict[str, str]:
    found = {c["what"]: c["outcome"] for c in json.loads(stdout)["checks"]}
    assert found["what only the run knows"] == "not checked"
    return {what: came for what, came in found.items() if what not in LEFT}


def test_a_certificate_is_recomputed_in_another_process(work: Path) -> None:
    found = json.loads(rankfold(*VERIFY, "--json", cwd=work).stdout)
    assert found["agrees"]
    assert {c["outcome"] for c in found["checks"] if c["what"] not in LEFT} == {"agrees"}
    stated = document(work)["certificate"]
    assert found["certificate"]["upper_bound"] == pytest.approx(stated["upper_bound"], abs=1e-5)
    assert found["certificate"]["examples"] == 360
    text = rankfold(*VERIFY, cwd=work).stdout
    assert "the certificate agrees with all that was checked" in text
    readable = (work / "out" / "certificate.txt").read_text()
    assert f"rankfold certificate: {stated['verdict']}" in readable
    assert "no earlier opening for another model is on record" in readable


@pytest.mark.parametrize(("processor", "threads"), [("sse", 2), ("avx2", 1)])
def test_it_agrees_on_another_processor(processor: str, threads: int, work: Path) -> None:
    """Weights and examples to the bit, losses but for rounding, far below what is tolerated."""
    settings = OTHER_PROCESSORS[processor] | {"OMP_NUM_THREADS": str(threads)}
    done = rankfold(*VERIFY, "--json", cwd=work, settings=settings)
    found, stated = json.loads(done.stdout), document(work)["certificate"]
    assert {c["outcome"] for c in found["checks"] if c["what"] not in LEFT} == {"agrees"}
    for number in ("change", "upper_bound"):
        assert found["certificate"][number] == pytest.approx(stated[number], abs=1e-6)


def test_without_the_original_its_losses_are_taken_from_the_certificate(work: Path) -> None:
    done = rankfold("verify", "out", *DATA, "--model", "net.py:net", "--json", cwd=work)
    found = checks(done.stdout)
    assert found["losses of the factorized model"] == "agrees"
    assert found["losses of the original model"] == "not checked"
    assert found["certificate from fresh losses"] == "agrees"


def test_the_held_out_part_alone_is_enough(work: Path) -> None:
    from rankfold.data.parts import split
    from rankfold.data.sources import read_npz

    held_out = split(read_npz(work / "data.npz"), seed=0).held_out
    x = (torch.stack([x for x, _ in held_out])[:, 0] * 255).round().byte().numpy()
    np.savez(work / "held.npz", x=x, y=np.array([int(y) for _, y in held_out]))
    rankfold("verify", "out", "--data", "held.npz", "--model", *NET, cwd=work)


def test_python_data_is_taken_whole_or_its_held_out_part(work: Path) -> None:
    more = "\n\ndef parts():\n    from rankfold.data.parts import split\n"
    more += "    return split(pairs(), 0)\n"
    (work / "net.py").write_text((work / "net.py").read_text() + more)
    for name in ("pairs", "parts"):
        rankfold("verify", "out", "--data", f"net.py:{name}", "--model", *NET, cwd=work)


# Cheats


def rewrite(work: Path, edit: Callable[[dict[str, Any]], object], *, forge: bool) -> None:
    """Edit the certificate; a forger brings every digest and the readable text up to date."""
    changed = document(work)
    edit(changed)
    if forge:
        changed["evidence_digest"] = evidence_digest(changed["evidence"])
        changed["digest"] = document_digest(changed)
        manifest = json.loads((work / "out" / "rankfold.json").read_text())
        manifest["certificate"] = changed["certificate"]
        (work / "out" / "rankfold.json").write_text(json.dumps(manifest))
        for name, content in files(changed).items():
            (work / "out" / name).write_text(content)
    else:
        (work / "out" / "certificate.json").write_text(json.dumps(changed))


def better_losses(d: dict[str, Any]) -> None:
    d["evidence"]["factorized_losses"] = [v - 0.1 for v in d["evidence"]["original_losses"]]


def worse_original(d: dict[str, Any]) -> None:
    d["evidence"]["original_losses"] = [v + 0.5 for v in d["evidence"]["original_losses"]]


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str, str]] = {
    "the verdict": (
        lambda d: d["certificate"].update(verdict="better"),
        "certificate from its own losses",
        "verdict: 'better' stated",
    ),
    "the bound": (
        lambda d: d["certificate"].update(upper_bound=-1.0),
        "certificate from its own losses",
        "upper_bound: -1.0 stated",
    ),
    "the margin of the verdict": (
        lambda d: d["certificate"].update(margin=9.0),
        "certificate from its own losses",
        "margin: 9.0 stated",
    ),
    "the losses": (better_losses, "losses of the factorized model", "360 of 360 do"),
    "the original's losses": (worse_original, "losses of the original model", "360 of 360 do"),
    "the plan": (
        lambda d: d["run"]["plan"]["hidden"].update(rank=1),
        "plan",
        "the ranks of hidden are others",
    ),
    "the range": (
        lambda d: d["statement"].update(highest=-5.0),
        "certificate from its own losses",
        "highest",
    ),
    "an example": (
        lambda d: d["data"]["held_out_examples"].__setitem__(3, "0" * 32),
        "held-out examples",
        "1 of 360 are not in the data given, or were changed (numbers, from 0: 3)",
    ),
}


@pytest.mark.parametrize("what", EDITS)
def test_an_edited_certificate_is_found_and_named(what: str, work: Path) -> None:
    edit, check, detail = EDITS[what]
    rewrite(work, edit, forge=False)
    assert "differs      digest of certificate.json" in rankfold(*VERIFY, cwd=work, expect=4).stdout
    # A forger who puts every digest right is found by the recomputation.
    rewrite(work, edit, forge=True)
    done = rankfold(*VERIFY, cwd=work, expect=4)
    assert "agrees       digest of certificate.json" in done.stdout
    line = next(s for s in done.stdout.splitlines() if s.startswith(f"differs      {check}"))
    assert detail in line
    assert "the certificate does NOT agree" in done.stdout


def test_an_edited_summary_and_text_are_found(work: Path) -> None:
    manifest = json.loads((work / "out" / "rankfold.json").read_text())
    manifest["certificate"]["verdict"] = "better"
    (work / "out" / "rankfold.json").write_text(json.dumps(manifest))
    text = work / "out" / "certificate.txt"
    text.write_text(text.read_text().replace("rankfold certificate", "golden certificate"))
    done = rankfold(*VERIFY, cwd=work, expect=4)
    assert "differs      certificate in rankfold.json: verdict: 'better' there" in done.stdout
    assert "differs      certificate.txt: line 1" in done.stdout
    text.unlink()
    assert "certificate.txt: the file is missing" in rankfold(*VERIFY, cwd=work, expect=4).stdout


def test_weights_swapped_after_certification_are_found(work: Path) -> None:
    file = work / "out" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if tensors[name].is_floating_point())
    tensors[name] = tensors[name] + 0.3
    save_file(tensors, file, metadata={"format": "pt"})
    done = rankfold(*VERIFY, cwd=work, expect=4)
    assert "differs      weights of the factorized model: model.safetensors does not" in done.stdout
    assert "differs      losses of the factorized model" in done.stdout


def test_another_original_is_found(work: Path) -> None:
    tensors = load_file(work / "net.safetensors")
    save_file({n: t * 0.5 for n, t in tensors.items()}, work / "worse.safetensors")
    verify = (*VERIFY[:-1], "worse.safetensors")
    done = rankfold(*verify, cwd=work, expect=4)
    assert "differs      weights of the original" in done.stdout
    assert "differs      losses of the original model" in done.stdout


def test_changed_data_and_labels_are_found(work: Path) -> None:
    with np.load(work / "data.npz") as archive:
        x, y = archive["x"].copy(), archive["y"].copy()
    np.savez(work / "labels.npz", x=x, y=(y + 1) % 4)
    done = rankfold("verify", "out", "--data", "labels.npz", "--model", *NET, cwd=work, expect=4)
    assert "differs      labels: those of 360 examples were changed" in done.stdout
    x[::7, 0, 0] ^= 1
    np.savez(work / "pixels.npz", x=x, y=y)
    done = rankfold("verify", "out", "--data", "pixels.npz", "--model", *NET, cwd=work, expect=4)
    assert "are not in the data given, or were changed" in done.stdout


def test_a_second_opening_with_another_model_is_recorded(work: Path) -> None:
    rankfold(*LOSSLESS[:-1], "again", cwd=work)  # the same model again is no other try
    assert "no earlier opening for another" in (work / "again" / "certificate.txt").read_text()
    rankfold(*LOSSLESS[:-1], "second", "--objective", "svd", cwd=work)
    text = (work / "second" / "certificate.txt").read_text()
    assert "1 other models were certified before on 360 of these examples" in text
    assert "chance of up to 10%, not 5%" in text


def test_shopping_for_seeds_is_shown(work: Path) -> None:
    for seed in (1, 2, 3):
        rankfold(*LOSSLESS[:-1], f"seed{seed}", "--seed", seed, cwd=work)
    history = json.loads((work / "seed3" / "certificate.json").read_text())["data"]["history"]
    assert history["others"] == 2  # each seed draws another part, and they share examples
    assert 0 < history["shared"] < 360
    assert "2 other models were certified before" in (work / "seed3/certificate.txt").read_text()


def test_calibration_examples_in_the_held_out_part_are_refused_even_mirrored(work: Path) -> None:
    parts = {}
    for seed, name in enumerate(("calibration", "selection", "held-out")):
        parts[name] = images(200, seed=seed + 1)
    x, _ = parts["held-out"]
    x[5] = parts["calibration"][0][3][:, ::-1]
    x[6] = np.rot90(parts["selection"][0][4])
    for name, (values, labels) in parts.items():
        np.savez(work / f"{name}.npz", x=values, y=labels)
    given = [f"--{name}={name}.npz" for name in parts]
    done = rankfold("lossless", *NET, *given, "--size", 0.8, "--out", "c", cwd=work, expect=2)
    assert "share 1 images, mirrored or turned by quarters" in done.stderr
    assert "3 = 5" in done.stderr
    assert not (work / "c").exists()


def test_calibration_text_pasted_into_the_held_out_part_is_refused(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model")
    words = TEXT.split()  # shuffled, since Python's manual repeats itself
    random.Random(0).shuffle(words)
    text = " ".join(words)
    third = len(text) // 3
    calibration, selection, rest = (text[i * third : (i + 1) * third] for i in range(3))
    (tmp_path / "calibration.txt").write_text(calibration)
    (tmp_path / "selection.txt").write_text(selection)
    (tmp_path / "held-out.txt").write_text(rest[:3000] + calibration[101:900] + rest[3000:])
    parts = [f"--{name}={name}.txt" for name in ("calibration", "selection", "held-out")]
    limits = [f"--{name}=1000" for name in ("limit", "selection-limit", "held-out-limit")]
    command = ("lossless", "model", *parts, *limits, "--length", 64, "--size", 0.9, "--out", "x")
    done = rankfold(*command, cwd=tmp_path, expect=2)
    assert (
        "windows of the held-out part stand for 50% or more in the calibration part" in done.stderr
    )
    (tmp_path / "held-out.txt").write_text(rest)
    rankfold(*command, cwd=tmp_path)
    found = ("verify", "x", "--data", "held-out.txt", "--length", 64)
    assert "agrees       losses of the factorized model" in rankfold(*found, cwd=tmp_path).stdout
    whole = rankfold(*found, "--model", "model", "--json", cwd=tmp_path)
    assert set(checks(whole.stdout).values()) == {"agrees"}
    other = rankfold(*found[:-1], 32, cwd=tmp_path, expect=2)
    assert "--length is 32, and the model in x was made with 64" in other.stderr


def test_edited_numbers_of_the_report_the_card_and_dropped_examples_are_found(work: Path) -> None:
    file, card = work / "out" / "rankfold.json", work / "out" / "README.md"
    whole, text = file.read_text(), card.read_text()
    for group, key in (("loss", "original"), ("accuracy", "factorized"), ("step", "noise")):
        manifest = json.loads(whole)
        manifest[group][key] += 0.01
        file.write_text(json.dumps(manifest))
        done = rankfold(*VERIFY, cwd=work, expect=4)
        assert f"differs      fields of rankfold.json: {group} is not what was saved" in done.stdout
    file.write_text(whole)
    card.write_text(text.replace("**lossless**", "**better**"))
    assert "differs      model card README.md" in rankfold(*VERIFY, cwd=work, expect=4).stdout
    card.write_text(text + "My own words.\n")
    assert "not checked  lines added to README.md" in rankfold(*VERIFY, cwd=work).stdout
    card.write_text(text)

    def drop(d: dict[str, Any]) -> None:
        for name in ("examples", "answers"):
            del d["data"][f"held_out_{name}"][-20:]
        for values in d["evidence"].values():
            if isinstance(values, list):
                del values[-20:]
        d["certificate"]["examples"] = 340

    rewrite(work, drop, forge=True)
    done = rankfold(*VERIFY, cwd=work, expect=4)
    assert "certificate.examples is 340, data.parts.held_out.examples 360" in done.stdout


# Tests, metrics, privacy


@pytest.mark.parametrize("test", ["t", "betting"])
def test_other_tests_are_recomputed_too(test: str, work: Path) -> None:
    rankfold(*LOSSLESS, "--overwrite", "--test", test, "--margin", 0.3, cwd=work)
    found = document(work)["certificate"]
    assert found["test"] == test
    if test == "betting":
        assert found["verdict"] in ("better", "lossless")
        assert found["examples"] < 360  # it stopped early
    done = rankfold(*VERIFY, "--json", cwd=work)
    assert set(checks(done.stdout).values()) == {"agrees"}


def test_private_losses_stay_out_and_are_recomputed(work: Path) -> None:
    rankfold(*LOSSLESS, "--overwrite", "--private", cwd=work)
    assert document(work)["evidence"] is None
    done = rankfold(*VERIFY, "--json", cwd=work)
    found = checks(done.stdout)
    assert found["certificate from fresh losses"] == "agrees"
    assert found["certificate from its own losses"] == "not checked"
    changed = document(work)
    changed["certificate"]["upper_bound"] -= 0.05
    changed["digest"] = document_digest(changed)
    (work / "out" / "certificate.json").write_text(json.dumps(changed))
    assert (
        "differs      certificate from fresh losses" in rankfold(*VERIFY, cwd=work, expect=4).stdout
    )


def test_accuracy_must_hold_too_where_a_margin_is_stated(work: Path) -> None:
    tiny = ("lossless", *NET, *DATA, "--size", 0.6, "--margin", 9, "--accuracy-margin", 0)
    report = json.loads(rankfold(*tiny, "--out", "tiny", "--json", cwd=work).stdout)
    (accuracy,) = report["certificate"]["metrics"]
    assert report["certificate"]["upper_bound"] < 9
    assert accuracy["upper_bound"] > 0
    assert accuracy["verdict"] == "not shown"
    assert report["certificate"]["verdict"] == accuracy["verdict"]


def test_compact_certified_tests_sizes_in_a_fixed_order(work: Path) -> None:
    compact = ("compact", *NET, *DATA, "--margin", 0.2, "--certified", "--out", "small", "--json")
    report = json.loads(rankfold(*compact, cwd=work).stdout)
    order = json.loads((work / "small" / "certificate.json").read_text())["run"]["order"]
    ratios = [entry["ratio"] for entry in order]
    assert ratios == sorted(ratios, reverse=True)
    shown = [e for e in order if e["verdict"] in ("better", "lossless")]
    assert order[: len(shown)] == shown  # nothing is tested after the first failure
    assert all(e["verdict"] is None for e in order[len(shown) + 1 :])
    assert report["ratio"] == pytest.approx(shown[-1]["ratio"])
    found = rankfold("verify", "small", *DATA, "--model", *NET, cwd=work).stdout
    assert "order of tests" in (work / "small" / "certificate.txt").read_text()
    assert "the certificate agrees" in found


# Bad input


def test_too_few_examples_are_said_at_the_start_with_the_number_needed(work: Path) -> None:
    few = (*LOSSLESS[:-1], "few", "--held-out-limit", 40)
    done = rankfold(*few, "--accuracy-margin", 0.01, cwd=work, expect=2)
    assert "held-out part has 40 independent examples: too few" in done.stderr
    assert "That needs 299 examples" in done.stderr
    assert "collect statistics" not in done.stderr
    done = rankfold(*few, "--largest-change", 2, cwd=work, expect=2)
    assert "That needs 598 examples" in done.stderr
    assert not (work / "few").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--test", "z"), "test is 'z'; expected one of bounded, t, betting"),
        (("--largest-change", "0"), "--largest-change is 0.0"),
        (("--largest-change", "nan"), "--largest-change is nan"),
        (("--largest-change", "1", "--test", "t"), "no part in the t test"),
        (("--accuracy-margin", "1.5"), "margin of accuracy is 1.5"),
        (("--confidence", "1"), "confidence is 1.0"),
    ],
)
def test_bad_statements_are_refused(options: tuple[str, ...], message: str, work: Path) -> None:
    done = rankfold(*LOSSLESS[:-1], "bad", *options, cwd=work, expect=2)
    assert message in done.stderr
    assert not (work / "bad").exists()


def test_verify_says_what_it_lacks(work: Path) -> None:
    none = rankfold("verify", "nowhere", *DATA, cwd=work, expect=2)
    assert "no such folder: nowhere" in none.stderr
    own = rankfold("verify", "out", *DATA, cwd=work, expect=2)
    assert "a class of your own" in own.stderr
    other = np.random.default_rng(9).integers(0, 255, (50, 8, 8)).astype(np.uint8)
    np.savez(work / "other.npz", x=other, y=np.zeros(50, dtype=np.int64))
    done = rankfold("verify", "out", "--data", "other.npz", "--model", *NET, cwd=work, expect=2)
    assert "none of the certificate's 360 held-out examples" in done.stderr
    alone = rankfold("verify", "out", *DATA, "--weights", "net.safetensors", cwd=work, expect=2)
    assert "--weights goes with --model" in alone.stderr
    (work / "out" / "certificate.json").unlink()
    assert "has no certificate.json" in rankfold(*VERIFY, cwd=work, expect=2).stderr


def test_spectra_that_are_not_found_may_be_of_another_processor(work: Path) -> None:
    data = [{"input_features": torch.rand(3, 4)} for _ in range(5)]
    with pytest.raises(InputError, match="other last digits on another processor"):
        verify(work / "out", torch.nn.Linear(4, 2), data)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "format_version None"),
        ('{"format_version": 99}', "format_version 99"),
        ('{"format_version": 1}', "is damaged"),
    ],
)
def test_a_damaged_certificate_is_refused(content: str, message: str, work: Path) -> None:
    (work / "out" / "certificate.json").write_text(content)
    assert message in rankfold(*VERIFY, cwd=work, expect=2).stderr
