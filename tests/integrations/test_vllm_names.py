"""Which matrices a fused layer of vLLM holds, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from rankfold.artifact import vllm_plugin
from rankfold.errors import InputError
from rankfold.integrations.vllm.names import Layout, Matrix

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def entry(name: str, form: str = "pivoted", **more: Any) -> dict[str, Any]:
    return {"name": name, "rank": 4, "second_rank": None, "form": form, "pivoted": True, **more}


def structure(*layers: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"layers": list(layers), "unpacked": [], "model": {"hooks": []}, **more}


def test_a_fused_layer_holds_dense_parts_beside_factorized_ones() -> None:
    blocks = entry("a.q_proj", "row-blocks", second_rank=3)
    layout = Layout(structure(blocks, entry("a.v_proj"), entry("b.o_proj", "pair")))
    assert layout.of_layer("a.qkv_proj", FUSED) == [
        Matrix("a.q_proj", "row-blocks", (4, 3)),
        Matrix("a.k_proj"),
        Matrix("a.v_proj", "pivoted", (4,)),
    ]
    assert layout.of_layer("a.gate_up_proj", FUSED) == []
    with pytest.raises(InputError, match=r"no layer of this name.\n  b\.o_proj\n.*to=\"dense\""):
        layout.check_asked()
    assert layout.of_layer("b.o_proj", FUSED) == [Matrix("b.o_proj", "pair", (4,))]
    layout.check_asked()


def test_fused_on_disk_is_one_matrix() -> None:
    layout = Layout(structure(entry("a.qkv_proj")))
    found = layout.of_layer("a.qkv_proj", {"qkv_proj": ["qkv_proj"]})
    assert found == [Matrix("a.qkv_proj", "pivoted", (4,))]


def test_layers_are_called_as_the_model_calls_them() -> None:
    tied = entry("model.embed", "pair", uses=["model.embed", "lm_head"])
    layout = Layout(structure(entry("model.a"), entry("tower.b"), tied))
    layout.rename(lambda name: None if name.startswith("tower") else name.replace("model.", ""))
    assert layout.of_layer("a", {}) == [Matrix("a", "pivoted", (4,))]
    head = layout.of_embedding("lm_head")
    # vLLM makes the lookup of some models without its name.
    assert layout.of_embedding("") == layout.of_embedding("embed") != head
    assert head == Matrix("lm_head", "pair", (4,), ("model.embed", "lm_head"))
    layout.check_asked()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (structure(entry("a.conv", "spatial-kh")), r"forms spatial-kh.*\n  a\.conv"),
        (structure(entry("a"), unpacked=["h.0.c_attn"]), r"Conv1D.*\n  h\.0\.c_attn"),
        (structure(model={"hooks": ["b"]}), r"hooks.*\n  b"),
    ],
)
def test_what_no_layer_can_hold_is_named(given: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        Layout(given)


def test_lookups_without_a_name_are_not_guessed() -> None:
    entries = [entry(name, "pair", uses=[name]) for name in ("words", "places")]
    with pytest.raises(InputError, match="which of its lookups"):
        Layout(structure(*entries)).of_embedding("")


def test_parts_of_a_module_of_experts() -> None:
    layout = Layout(structure(entry("mlp.experts.0.up"), entry("mlp.expert")))
    assert layout.below("mlp.experts") == ["mlp.experts.0.up"]


def test_without_vllm_a_plugin_says_so_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """Another model is to be served all the same."""
    pytest.importorskip("torch")
    try:
        import vllm  # noqa: F401
    except ImportError:
        vllm_plugin.register()
        (record,) = caplog.records
        assert "rankfold needs vLLM 0.32 or newer" in record.getMessage()
