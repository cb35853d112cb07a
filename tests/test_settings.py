"""Each setting is written once: name, type, default, help and panel."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from typing import Any, cast, get_args, get_type_hints

import numpy as np
import pytest

import rankfold
from rankfold import InputError
from rankfold.effort import DECIDED, EFFORTS, EffortName
from rankfold.settings import Panel, SettingKeywords, Settings, setting_options
from tests.small_models import image_data, trained_cnn


def test_keywords_have_the_names_and_types_of_the_fields() -> None:
    assert get_type_hints(SettingKeywords) == get_type_hints(Settings)
    assert SettingKeywords.__required_keys__ == frozenset()


@pytest.mark.parametrize("name", [field.name for field in fields(Settings)])
def test_a_field_says_what_it_means_and_where_it_is_shown(name: str) -> None:
    option = setting_options()[name]
    assert re.fullmatch(r"[A-Z].{9,}\.", option.help), option.help
    assert "ikewise" not in option.help
    assert option.panel in get_args(Panel)
    may_be_none = type(None) in option.alternatives
    assert (option.unset is not None) == may_be_none, "what None stands for is said, and only then"
    expected = getattr(EFFORTS["standard"], name) if name in DECIDED else option.default
    assert getattr(Settings(), name) == expected


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("name", DECIDED)
def test_an_effort_decides_what_is_not_given(effort: EffortName, name: str) -> None:
    assert getattr(Settings(effort=effort), name) == getattr(EFFORTS[effort], name)
    given: Any = {name: 3 if name == "rounds" else not getattr(EFFORTS[effort], name)}
    assert getattr(Settings(effort=effort, **given), name) == given[name]
    assert replace(Settings(effort=effort, **given), seed=1) == Settings(
        effort=effort, seed=1, **given
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"limit": "5"}, "limit is '5'; expected a whole number"),
        ({"rounds": 1.5}, "rounds is 1.5; expected a whole number"),
        ({"rounds": True}, "rounds is True; expected a whole number"),
        ({"seed": "a"}, "seed is 'a'; expected a whole number"),
        ({"seed": None}, "seed is None; expected a whole number"),
        ({"refit": "no"}, "refit is 'no'; expected True or False"),
        ({"private": 3}, "private is 3; expected True or False"),
        ({"confidence": "high"}, "confidence is 'high'; expected a number"),
        ({"damping": "some"}, "damping is 'some'; expected one of auto"),
        ({"cost": "bytes"}, "cost is 'bytes'; expected one of parameters, flops"),
        ({"cost": 3}, "cost is 3; expected parameters or flops"),
        ({"include": "hidden"}, "include is 'hidden'; expected a list of patterns"),
        ({"exclude": 3}, "exclude is 3; expected a list of patterns"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        Settings(**options)


def test_numbers_of_numpy_are_numbers() -> None:
    np = pytest.importorskip("numpy")
    assert Settings(limit=np.int64(8), confidence=np.float64(0.9)).limit == 8


def test_an_unknown_keyword_is_named_with_the_known_ones() -> None:
    wrong: Any = {"loud": True}
    with pytest.raises(
        TypeError, match="no keyword loud; expected some of task, effort, objective"
    ):
        rankfold.lossless(trained_cnn(), image_data(20), size=0.9, **wrong)


def test_numbers_of_numpy_become_pythons_own() -> None:
    names = ("seed", "confidence", "limit")
    given = dict(zip(names, (np.int64(3), np.float32(0.9), np.int64(50)), strict=True))
    found = Settings(**cast("Any", given))
    assert found == Settings(seed=3, confidence=float(np.float32(0.9)), limit=50)
    values = [getattr(found, name) for name in names]
    assert [type(value) for value in values] == [int, float, int]
    json.dumps(values)
