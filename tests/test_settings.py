"""Each setting is written once: name, type, default, help and panel."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

from rankfold.settings import Panel, SettingKeywords, Settings, setting_options


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
    assert getattr(Settings(), name) == option.default
