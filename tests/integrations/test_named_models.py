"""``timm:NAME,option=value`` is read without timm; the models are in ``test_vision_models``."""

from __future__ import annotations

from typing import Any

import pytest

from rankfold import InputError
from rankfold.integrations.vision import NamedModel, is_named, parse_named


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        ("timm:resnet18", {}),
        ("timm:vit_tiny_patch16_224.augreg_in21k,num_classes=10", {"num_classes": 10}),
        (
            "torchvision:mobilenet_v2,width_mult=0.5,global_pool=avg,dynamic=true",
            {"width_mult": 0.5, "global_pool": "avg", "dynamic": True},
        ),
    ],
)
def test_a_name_and_its_options(spec: str, options: dict[str, Any]) -> None:
    assert is_named(spec)
    named = parse_named(spec)
    assert f"{named.library}:{named.name}" == spec.split(",")[0]
    assert named.options == options
    assert str(named) == spec
    assert NamedModel(**named.as_dict()) == named


@pytest.mark.parametrize(
    "spec", ["timm", "timm:", "keras:resnet", "net.py:net", "timm:a/b", "timm:a,b", "timm:a,=1"]
)
def test_what_is_none(spec: str) -> None:
    assert not is_named(spec)
    with pytest.raises(InputError, match="names no model"):
        parse_named(spec)


@pytest.mark.parametrize(
    "option",
    ["pretrained", "checkpoint_path", "weights", "pretrained_cfg", "cache_dir", "cfg_file", "9"],
)
def test_options_that_name_files_or_downloads_are_refused(option: str) -> None:
    with pytest.raises(InputError, match=f"option '{option}'"):
        parse_named(f"timm:resnet18,{option}=1")


@pytest.mark.parametrize("value", [None, {}, [1], ("a",)])
def test_options_are_plain(value: object) -> None:
    with pytest.raises(InputError, match="expected a number, true, false or a word"):
        NamedModel("timm", "resnet18", {"act_layer": value})
