"""A verdict is about its own kind of data; what else is lost stands beside it, or is part of it."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings, strategies
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import rankfold
from rankfold import Data, InputError
from rankfold.artifact.manifest import read_report
from rankfold.certificate.certify import FROM_BEST, Certificate
from rankfold.certificate.document import files, read_guard
from rankfold.certificate.earlier_uses import record_file
from rankfold.certificate.in_words import guard_words
from rankfold.certificate.openings_file import read
from rankfold.certificate.other_kinds import OTHER_DATA, OTHER_TEXT, OtherKinds
from rankfold.certificate.schema import GuardFields
from rankfold.cli.options import Parts
from rankfold.cli.tables import plain_console, print_result
from rankfold.data.account import WRITTEN, Account, ReadExamples
from rankfold.data.copies import ELSEWHERE
from rankfold.data.parts import SAME
from rankfold.files.checked import check
from rankfold.integrations.transformers import own_text
from rankfold.report.data_lines import source_lines
from rankfold.result import Result
from tests.command_line import rankfold as command
from tests.small_models import (
    VOCABULARY,
    image_data,
    mlp,
    pairs,
    seeded,
    tiny_llama,
    token_data,
    token_windows,
    trained_cnn,
)
from tests.tiny_language_model import TEXT, save_tiny_llama

QUICK: dict[str, Any] = {"size": 0.8, "objective": "svd", "effort": "fast", "margin": 5.0}


def _run(model: nn.Module | None = None, data: object = None, **options: Any) -> Result:
    given = tiny_llama() if model is None else model
    return rankfold.lossless(given, data or token_data(), **{**QUICK, **options})


def _other(count: int = 12, seed: int = 77) -> list[Tensor]:
    """Text of the half of the words that comes last."""
    return [window // 2 + VOCABULARY // 2 for window in token_windows(count, seed)]


def _losses(model: nn.Module, texts: Any) -> Tensor:
    """The truth, in plain torch: of each text alone."""
    found = []
    with torch.no_grad():
        for ids in texts:
            ids = torch.as_tensor(ids)
            logits = model(input_ids=ids[None]).logits[0, :-1]
            found.append(functional.cross_entropy(logits.float(), ids[1:]))
    return torch.stack(found).double()


def test_the_models_own_text_is_measured_and_stands_in_every_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.random.get_rng_state()
    result = _run()
    assert torch.equal(torch.random.get_rng_state(), state)
    row, kept = result.report["guard"], result.document["guard"]
    texts = kept["texts"]
    before, after = _losses(tiny_llama(), texts), _losses(result.model, texts)
    assert (row["kind"], row["name"], row["examples"]) == ("own text", OTHER_TEXT, len(texts))
    assert row["terms"] == sum(len(ids) - 1 for ids in texts)
    for name, value in (("original", before), ("factorized", after), ("change", after - before)):
        assert row[name] == pytest.approx(float(value.mean()), rel=1e-5)
    error = float((after - before).std() / len(texts) ** 0.5)
    assert row["standard_error"] == pytest.approx(error, rel=1e-4)
    assert row["margin"] is None and result.certificate.guard is None
    words = f"change {row['change']:+.4f} ± {error:.4f} (standard error) nats per token on 4 texts"
    told = f"{words} that the original wrote itself (seed {row['seed']}), 44 tokens; outside the"
    print_result(plain_console(sys.stdout), result.report, "title")
    shown = " ".join(capsys.readouterr().out.split())
    assert f"text of other kinds: {told} verdict" in shown
    assert "loss on text of other kinds" in shown
    assert (
        f"verdict: {result.certificate.verdict}, on text like the held-out part: with 95%" in shown
    )
    folder = result.save(tmp_path / "a")
    assert f"Text of other kinds: {told}" in (folder / "README.md").read_text().replace("\\", "")
    assert "on text like the held-out part it is no worse" in (folder / "README.md").read_text()
    assert f"beside         text of other kinds: {told}" in (folder / "certificate.txt").read_text()
    assert json.loads((folder / "rankfold.json").read_text())["guard"] == row
    assert json.loads((folder / "certificate.json").read_text())["guard"]["texts"] == texts
    assert (
        "about          text like the held-out part\n" in (folder / "certificate.txt").read_text()
    )


def test_the_seed_decides_what_is_written() -> None:
    texts = [_run(seed=seed).document["guard"]["texts"] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert all(0 <= token < VOCABULARY for text in texts[2] for token in text)


@pytest.mark.parametrize(("effort", "count"), [("fast", 16), ("standard", 32), ("thorough", 64)])
def test_effort_and_the_calibration_part_limit_it(effort: str, count: int) -> None:
    data = Data(token_windows(660, 31), token_windows(8, 32), token_windows(8, 33))
    for limit, expected in ((660, count), (128, 12)):
        made = _run(data=data, effort=effort, limit=limit, rounds=1)
        assert made.report["guard"]["examples"] == expected
        assert {len(text) for text in made.document["guard"]["texts"]} == {12}


def test_no_choice_is_made_by_it() -> None:
    ways: list[dict[str, Any]] = [
        {}, {"guard": _other()}, {"guard": _other(), "guard_margin": 5.0}, {"guard_margin": 5.0},
    ]  # fmt: skip
    found = [_run(objective="joint", **way).document["models"]["factorized"] for way in ways]
    assert len({*found}) == 1


def test_examples_that_the_user_gives_are_measured() -> None:
    given = _other()
    row = (result := _run(guard=given)).report["guard"]
    change = _losses(result.model, given) - _losses(tiny_llama(), given)
    assert (row["kind"], row["examples"], row["margin"]) == ("given", 12, None)
    assert row["change"] == pytest.approx(float(change.mean()), rel=1e-4)
    assert result.document["guard"]["texts"] is None
    assert "12 examples of guard=, 132 tokens; outside the verdict" in guard_words(row)
    many = _run(guard=_other(40)).report["guard"]
    assert many["examples"] == 16
    assert many["left_out"] == {"beyond the 16 that are used": 24}


def test_what_stands_in_the_users_data_is_no_other_kind(capsys: pytest.CaptureFixture[str]) -> None:
    data = token_data()
    held_out, calibration = list(data.held_out), list(data.calibration)
    other = _other(6)
    row = _run(guard=[*held_out[:3], *calibration[:2], *other, other[0]]).report["guard"]
    assert row["examples"] == 6 and row["given"] == 12
    assert row["left_out"] == {ELSEWHERE: 5, SAME: 1}
    with pytest.raises(
        InputError, match=r"guard= has 3 examples that can be used; at least 4.*5 the"
    ):
        _run(guard=[*held_out[:5], *other[:3]])
    long = Data(*(token_windows(8, seed, length=64) for seed in (41, 42, 43)))
    moved = [torch.cat([window[8:], window[:8]]) for window in list(long.calibration)[:4]]
    row = _run(data=long, guard=[*moved, *token_windows(5, 44, length=64)]).report["guard"]
    assert row["examples"] == 5
    assert [*row["left_out"].values()] == [4]
    assert "of which 50% or more" in next(iter(row["left_out"]))


@pytest.mark.parametrize(
    ("guard", "words"),
    [
        (token_data(), "guard= is three parts; expected one data set"),
        (pairs(8), "expected the same columns"),
        (5, "guard=: data is int"),
        ([torch.arange(12)] * 8, "guard= has 1 examples that can be used"),
        ([torch.arange(3)], "guard= has 1 examples"),
    ],
    ids=["data", "pairs", "number", "one text", "too few"],
)
def test_examples_that_cannot_be_used_are_refused_by_name(guard: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        _run(guard=guard)


@cache
def _written(count: int) -> list[Tensor]:
    """What the original writes: there a smaller model is worse."""
    return own_text(tiny_llama(), count, 12, seed=5)


@cache
def _change(count: int) -> float:
    change: float = _run(size=0.6, guard=_written(count), effort="thorough", rounds=1).report[
        "guard"
    ]["change"]
    return change


@pytest.mark.parametrize("test", ["bounded", "t", "betting"])
@pytest.mark.parametrize(
    ("count", "share", "verdict"),
    [(64, 9, "lossless"), (64, 0.1, "worse"), (8, 1, "not shown")],
    ids=["met", "not met", "inconclusive"],
)
def test_the_verdict_holds_only_if_both_do(
    test: str, count: int, share: float, verdict: str
) -> None:
    """At a margin that is a share of the true change."""
    margin = share * _change(count)
    assert margin > 0
    given = _written(count)
    result = _run(size=0.6, margin=50.0, test=test, guard=given, guard_margin=margin)
    whole, of_guard = result.certificate, result.certificate.guard
    assert of_guard is not None
    apart = 0 if test == "t" else max(4, count // 4)
    assert (of_guard.verdict, of_guard.margin) == (verdict, margin)
    assert of_guard.examples == count - apart
    assert sum(result.report["guard"]["left_out"].values()) == apart
    assert whole.upper_bound <= whole.margin
    assert whole.verdict == verdict and whole.holds == (verdict == "lossless")
    row = result.report["guard"]
    assert (row["verdict"], row["margin"]) == (verdict, margin)
    text = files(result.document)["certificate.txt"]
    assert text.startswith(f"rankfold certificate: {verdict}\n")
    assert "and on text of other kinds: both must hold" in text
    assert f"(margin {margin:g}): {verdict}; the verdict holds only if this does too" in text
    number = "no number of" if row["needed"] is None else f"about {row['needed']}"
    needed = f"to show it     {number} examples of other kinds"
    assert (needed in text) == ("to show it" in text) == (verdict == "not shown")


def test_examples_of_a_margin_are_recorded_as_opened_and_others_are_not() -> None:
    for margin, recorded in ((None, 12), (5.0, 20)):
        _run(guard=_other(), guard_margin=margin)
        file = record_file()
        assert file is not None
        assert len(read(file).openings[-1].examples) == recorded


def test_few_examples_and_a_large_change_are_refused_before_any_work() -> None:
    with pytest.raises(InputError, match=r"there are 12 examples of other kinds.*guard_margin="):
        _run(guard=_other(), guard_margin=0.5, largest_change=9.0, margin=9.0)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="guard_margin is"):
            _run(guard_margin=bad)


class Own(nn.Module):
    """A language model of the user's own: nothing in it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 16)
        self.layer = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.words(input_ids)))


class Refuses(hf.LlamaForCausalLM):
    def generate(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no cache")


def _refuses() -> nn.Module:
    model = tiny_llama()
    model.__class__ = Refuses
    return model


def _t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return seeded(0, lambda: hf.T5ForConditionalGeneration(config)).eval()


def _named(data: Data, *names: str) -> Data:
    """The windows as mappings in which they stand under each name, without the padding token 0."""
    parts = ([dict.fromkeys(names, window.clamp(min=1)) for window in p] for p in
             (data.calibration, data.selection, data.held_out))  # fmt: skip
    return Data(*parts)


def _self() -> Data:
    account = Account(f"{WRITTEN} for the held-out part", "window", 12, 12)
    data = token_data()
    return Data(data.calibration, data.selection, ReadExamples(list(data.held_out), account))


def is_row(value: object) -> bool:
    try:
        check(value, GuardFields, "the row")
    except InputError:
        return False
    return True


@pytest.mark.parametrize(
    ("model", "data", "why"),
    [
        (lambda: seeded(1, Own), token_data,
         "Own writes no text alone; guard= takes text of yours"),
        (_refuses, token_data, "the model can't write: RuntimeError: no cache"),
        (_t5, lambda: _named(token_data(), "input_ids", "labels"),
         "T5ForConditionalGeneration writes no text alone; guard= takes text of yours"),
        (tiny_llama, _self, "the data are the model's own text already; guard= takes other text"),
    ],
    ids=["own class", "fails", "seq2seq", "self"],
)  # fmt: skip
def test_a_model_that_cannot_write_says_so(
    model: Callable[[], nn.Module], data: Callable[[], Data], why: str, tmp_path: Path
) -> None:
    result = _run(model(), data())
    row = result.report["guard"]
    assert (row["kind"], row["missing"]) == (None, why)
    assert is_row(row)
    assert (
        f"beside         text of other kinds: not measured: {why}"
        in files(result.document)["certificate.txt"]
    )
    shown = io_of(result.report)
    assert f"text of other kinds: not measured: {why.replace('guard=', '--guard')}" in shown
    assert f"not measured: {why}" in (result.save(tmp_path / "a") / "README.md").read_text()
    with pytest.raises(InputError, match=r"guard_margin is 0.1, but there are no examples.*guard="):
        _run(model(), data(), guard_margin=0.1)
    if row["missing"].startswith("Own"):
        assert _run(model(), data(), guard=_other()).report["guard"]["examples"] == 12


def io_of(report: dict[str, Any]) -> str:
    out = io.StringIO()
    print_result(plain_console(out, width=500), report, "title")
    return out.getvalue()


def test_other_tasks_have_the_row_only_where_examples_are_given() -> None:
    data = image_data(40)
    assert _run(trained_cnn(), data).report["guard"] is None
    with pytest.raises(InputError, match="only a language model can write some of its own"):
        _run(trained_cnn(), data, guard_margin=0.1)
    dark = [(image * 0.5 - 1, label) for image, label in image_data(30).calibration]
    result = _run(trained_cnn(), data, guard=dark, guard_margin=5.0)
    row = result.report["guard"]
    assert (row["name"], row["kind"], row["examples"]) == (OTHER_DATA, "given", 22)
    assert "verdict: lossless, on data like the held-out part and on data of other kinds" in io_of(
        result.report
    )
    assert "loss on data of other kinds" in io_of(result.report)
    model = mlp()
    loss = _run(
        model, Data(pairs(20), pairs(20, 1), pairs(20, 2)), guard=pairs(9, 3),
        loss=lambda m, batch: functional.cross_entropy(m(batch[0]), batch[1], reduction="none"),
    )  # fmt: skip
    assert loss.report["guard"]["examples"] == 9


def test_a_language_model_that_is_to_agree_with_itself_writes_too() -> None:
    data = token_data()
    mask = torch.ones(12, dtype=torch.int64)
    parts = ([{"input_ids": window, "attention_mask": mask} for window in part]
             for part in (data.calibration, data.selection, data.held_out))  # fmt: skip
    row = _run(data=Data(*parts), task="teacher").report["guard"]
    assert (row["kind"], row["name"], row["examples"]) == ("own text", OTHER_TEXT, 4)
    assert row["original"] == 0 and row["change"] > 0 and row["terms"] == 48


def test_a_loader_pads_them_as_it_pads_the_data() -> None:
    def padded(windows: list[Tensor]) -> dict[str, Tensor]:
        longest = max(map(len, windows))
        rows = [functional.pad(w + 1, (0, longest - len(w))) for w in windows]
        ids = torch.stack(rows)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    def loader(seed: int) -> DataLoader[Any]:
        windows = [w[: 5 + n % 7] // 2 for n, w in enumerate(token_windows(12, seed))]
        return DataLoader(windows, batch_size=4, collate_fn=padded)  # type: ignore[arg-type]

    result = _run(data=Data(loader(21), loader(22), loader(23)), guard=loader(24))  # type: ignore[arg-type]
    row = result.report["guard"]
    lengths = [5 + n % 7 for n in range(12)]
    losses = _losses(tiny_llama(), [w + 1 for w in loader(24).dataset])  # type: ignore[attr-defined]
    weights = torch.tensor(lengths).double() - 1
    assert row["terms"] == int(weights.sum())
    assert row["original"] == pytest.approx(float((losses * weights).sum() / weights.sum()))


def test_a_loss_that_is_not_finite_there_is_told_and_does_not_end_the_run() -> None:
    bad = [(torch.full((6,), 1e38), 1) for _ in range(5)]
    bad = [(x * ((n + 1) / 9), y) for n, (x, y) in enumerate(bad)]
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5))
    with torch.no_grad():
        model[0].weight.mul_(50)
    row = _run(model, Data(pairs(20), pairs(20, 1), pairs(20, 2)), guard=bad).report["guard"]
    assert row["change"] is None
    assert guard_words(row) == "the loss is not finite on 5 examples of guard=; outside the verdict"
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize("private", [False, True])
def test_verify_computes_it_again(private: bool, tmp_path: Path) -> None:
    held_out, other = list(token_data().held_out), _other()
    own = _run(private=private).save(tmp_path / "own")
    asked = _run(private=private, guard=other, guard_margin=5.0).save(tmp_path / "asked")
    what, fresh = "losses on other kinds", "certificate from fresh losses"
    for folder, guard, expected, then in (
        (own, None, "agrees", "agrees"),
        (asked, other, "agrees", "agrees"),
        (asked, other[2:], "differs", None),
        (asked, None, "not checked", "not checked" if private else "agrees"),
    ):
        found = rankfold.verify(
            folder, rankfold.load(folder), held_out, original=tiny_llama(), guard=guard
        )
        checks = {check.what: check.outcome for check in found.checks}
        assert checks[what] == expected
        assert then is None or checks[fresh] == then
        assert found.holds == (expected != "differs")


def test_verify_finds_what_was_changed(tmp_path: Path) -> None:
    folder = _run().save(tmp_path / "a")
    held_out = list(token_data().held_out)
    for name in ("rankfold.json", "certificate.json"):
        file = folder / name
        content = file.read_text()
        plain = json.loads(content)
        plain["guard"]["change"] -= 1
        file.write_text(json.dumps(plain))
        model = rankfold.load(folder, as_saved=False)
        found = rankfold.verify(folder, model, held_out)
        differs = {check.what for check in found.checks if check.outcome == "differs"}
        assert "other kinds in rankfold.json" in differs
        assert ("losses on other kinds" in differs) == (name == "certificate.json")
        file.write_text(content)


VERDICTS = strategies.sampled_from(FROM_BEST)


@settings(deadline=None)
@given(first=VERDICTS, second=VERDICTS)
def test_two_verdicts_are_the_worse_one(first: Any, second: Any) -> None:
    made = _certificate()
    one, other = (replace(made, verdict=verdict) for verdict in (first, second))
    both = one.guarded_by(other)
    assert both.verdict in (first, second)
    assert both.holds == (one.holds and other.holds)
    assert (both.verdict == "better") == (first == second == "better")
    assert (both.verdict == "worse") == ("worse" in (first, second))
    assert both.as_dict()["guard"]["verdict"] == second
    assert one.guarded_by(None) is one


@cache
def _certificate() -> Certificate:
    return _run().certificate


@cache
def _kinds() -> list[dict[str, Any]]:
    ways: list[dict[str, Any]] = [
        {}, {"guard": _other()}, {"guard": _other(), "guard_margin": 5.0},
        {"guard": _other(), "guard_margin": 5.0, "private": True},
    ]  # fmt: skip
    return [
        *(_run(**way).document["guard"] for way in ways),
        _run(seeded(1, Own)).document["guard"],
    ]


def test_it_is_read_as_it_was_written() -> None:
    for plain in _kinds():
        again = json.loads(json.dumps(plain))
        assert again == plain and is_row(plain)
        found = OtherKinds.from_dict(again)
        if found.original is not None or found.origin is None:
            assert found.as_dict(private=False) == plain
    assert read_guard({}) is None


@settings(deadline=None)
@given(data=strategies.data())
def test_a_damaged_row_is_no_row_or_is_shown(data: strategies.DataObject) -> None:
    plain = dict(data.draw(strategies.sampled_from(_kinds())))
    name = data.draw(strategies.sampled_from(sorted(plain)))
    plain[name] = data.draw(
        strategies.sampled_from([None, "x", 3, -0.5, [], {}, {"a": 1}, {"a": "b"}, True])
    )
    if is_row(plain):
        assert guard_words(plain)


def test_the_command_line_reads_it_like_the_data(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path / "model")
    (tmp_path / "docs.txt").write_text(TEXT[:30_000])
    (tmp_path / "other.txt").write_text(TEXT[:1_000] + "the model reads this\n" * 5 + TEXT[40_000:])
    done = command(
        "lossless", "model", "--data", "docs.txt", "--length", "32", "--size", "0.8", "--effort",
        "fast", "--guard", "other.txt", "--guard-margin", "3", "--margin", "3", "--json", "--out",
        "out", cwd=tmp_path,
    )  # fmt: skip
    assert "other.txt: " in done.stderr
    report = json.loads(done.stdout)
    row = report["guard"]
    assert (row["source"], row["margin"], row["verdict"]) == ("other.txt", 3.0, "lossless")
    assert row["told"][0].startswith("other.txt: ")
    assert sum(row["left_out"].values()) + row["examples"] == row["given"]
    assert any("part" in reason for reason in row["left_out"])
    joined = " ".join(io_of(read_report(tmp_path / "out")).split())
    assert (
        "verdict: lossless, on text like docs.txt and on text of other kinds (both must" in joined
    )
    assert "left out of the examples of other kinds: " in joined
    assert row["told"][0] in source_lines(report)


def test_the_models_own_text_needs_no_option() -> None:
    with pytest.raises(InputError, match="--guard is self, which is what stands for it"):
        Parts(data="x.txt", guard="self").check()
