"""Samples of lm-evaluation-harness: paired by document, and whatever doesn't pair is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rankfold.errors import InputError
from rankfold.given_models import certify_samples
from rankfold.others.samples import read_samples
from rankfold.settings import Settings

COUNT = 400
NAME = "samples_arc_easy_2026-01-02T03-04-05.678901.jsonl"
Samples = list[dict[str, Any]]


def sample(document: int, acc: float) -> dict[str, Any]:
    return {
        "doc_id": document,
        "doc": {"question": f"question {document}"},
        "target": "a",
        "filter": "none",
        "metrics": ["acc", "acc_norm"],
        "doc_hash": f"{document:064x}",
        "prompt_hash": f"{document + 1:064x}",
        "target_hash": f"{7:064x}",
        "acc": acc,
        "acc_norm": 1.0,
    }


def samples(wrong: int = 100) -> Samples:
    return [sample(one, float(one >= wrong)) for one in range(COUNT)]


def write(folder: Path, lines: Samples, name: str = NAME) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("".join(json.dumps(one) + "\n" for one in lines))
    return folder / name


def pair(tmp_path: Path, first: Samples, second: Samples) -> tuple[Path, Path]:
    return write(tmp_path / "a", first), write(tmp_path / "b", second)


def test_paired_by_document_whatever_the_order(tmp_path: Path) -> None:
    found = read_samples(*pair(tmp_path, samples(), samples(100)[::-1]), "acc")
    assert found.task == "arc_easy"
    first, second = found.losses
    assert torch.equal(first.losses, second.losses)
    assert first.losses.sum() == 100
    certified = certify_samples(found, margin=0.01, settings=Settings())
    assert certified.certificate.verdict == "lossless"
    assert certified.document["run"]["about"] == "documents like arc_easy"


def test_worse_and_better(tmp_path: Path) -> None:
    for wrong, verdict in ((160, "worse"), (40, "better")):
        found = read_samples(*pair(tmp_path, samples(100), samples(wrong)), "acc")
        certificate = certify_samples(found, margin=0.01, settings=Settings()).certificate
        assert certificate.verdict == verdict
        assert certificate.change == pytest.approx((wrong - 100) / COUNT)


def test_too_few_documents_are_refused_with_their_number(tmp_path: Path) -> None:
    found = read_samples(*pair(tmp_path, samples()[:200], samples()[:200]), "acc")
    with pytest.raises(InputError, match=r"200 independent examples.*needs 299"):
        certify_samples(found, margin=0.01, settings=Settings())


def without(name: str) -> Callable[[Samples], Samples]:
    return lambda lines: [{k: v for k, v in one.items() if k != name} for one in lines]


def changed(name: str, value: Any) -> Callable[[Samples], Samples]:
    return lambda lines: [*lines[:-1], {**lines[-1], name: value}]


REFUSED: dict[str, tuple[Callable[[Samples], Samples], str]] = {
    "one is missing": (lambda lines: lines[1:], "doc_id 0: in .* alone"),
    "one stands twice": (lambda lines: [*lines, lines[3]], "stand twice:\n  doc_id 3"),
    "another document": (changed("doc_hash", "x"), "doc_id 399: another doc_hash"),
    "another prompt": (changed("prompt_hash", "x"), "doc_id 399: another prompt_hash"),
    "another target": (changed("target_hash", "x"), "doc_id 399: another target_hash"),
    "no number": (changed("acc", None), "doc_id 399: acc is None"),
    "above 1": (changed("acc", 3.5), "doc_id 399: acc is 3.5"),
    "not a number": (changed("acc", float("nan")), "doc_id 399: acc is nan"),
    "no doc_id": (without("doc_id"), "line 1 has no doc_id"),
    "no such metric": (without("acc"), "the metric is 'acc'.* have: acc_norm"),
    "another filter": (changed("filter", "strict"), "of different filters"),
    "one sample": (lambda lines: lines[:1], "has 1 samples"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    change, message = REFUSED[name]
    files = pair(tmp_path, samples(), change(samples()))
    with pytest.raises(InputError, match=message):
        read_samples(*files, "acc")


def test_other_tasks_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a", samples())
    second = write(tmp_path / "b", samples(), NAME.replace("arc_easy", "hellaswag"))
    with pytest.raises(InputError, match=r"is of the task arc_easy, .* of hellaswag"):
        read_samples(first, second, "acc")


def test_several_metrics_and_filters_have_to_be_named(tmp_path: Path) -> None:
    both = [{**one, "filter": name} for name in ("strict", "loose") for one in samples()]
    files = pair(tmp_path, both, both)
    with pytest.raises(InputError, match="several filters: loose, strict"):
        read_samples(*files, "acc")
    found = read_samples(*files, "acc", "strict")
    assert found.left_out == {"lines of other filters": COUNT}
    with pytest.raises(InputError, match=r"no metric is named.*acc, acc_norm"):
        read_samples(*files, None, "strict")
    with pytest.raises(InputError, match="the filter is 'x'"):
        read_samples(*files, "acc", "x")


def test_older_samples_are_compared_by_their_documents(tmp_path: Path) -> None:
    old = [
        {k: v for k, v in one.items() if not k.endswith("_hash") and k != "metrics"}
        for one in samples()
    ]
    assert read_samples(*pair(tmp_path, old, old), "acc").documents
    other = [*old[:-1], {**old[-1], "doc": {"question": "another"}}]
    with pytest.raises(InputError, match="doc_id 399: another doc"):
        read_samples(*pair(tmp_path, old, other), "acc")


def test_what_is_no_json_is_named(tmp_path: Path) -> None:
    first, second = pair(tmp_path, samples(), samples())
    second.write_text("{}\n{")
    with pytest.raises(InputError, match="line 1 has no doc_id"):
        read_samples(first, second, "acc")
    second.write_text("{")
    with pytest.raises(InputError, match="line 1 is no JSON"):
        read_samples(first, second, "acc")
    with pytest.raises(InputError, match="no such file of samples"):
        read_samples(first, tmp_path / "none", "acc")
