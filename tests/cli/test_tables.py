import io

import pytest

from rankfold.cli.tables import layers_table, not_factorized_table, plain_console

NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.29.mlp.down_proj"]


def layer(name, **other):
    found = {"radius": 0.5, "lossless_rank": 3, "signal": 1.0, "noise": 4.0}
    entry = {
        "name": name,
        "kind": "Linear",
        "shape": [576, 1536],
        "rank": 545,
        "second_rank": 525,
        "form": "column-blocks",
        "parameters": 884_736,
        "factorized_parameters": 865_430,
        "predicted_change": 0.00009,
        "harmless_range": found,
    }
    return {**entry, **other}


def report(**other):
    reason = "its weight is shared with model.embed_tokens: tied weights stay as they are"
    head = {"name": "lm_head", "kind": "Linear", "reason": reason}
    return {"layers": [layer(name, **other) for name in NAMES], "not_factorized": [head]}


def printed(table, width):
    out = io.StringIO()
    plain_console(out, width=width).print(table)
    return out.getvalue()


@pytest.mark.parametrize(
    ("width", "left_out"),
    [
        (160, []),
        (116, ["harmless radius", "lossless rank alone", "signal / noise"]),
        (95, ["harmless radius", "lossless rank alone", "signal / noise", "kind", "parameters"]),
        (70, ["signal / noise", "kind", "parameters", "shape", "form"]),
    ],
)
def test_names_are_whole_at_every_width_and_what_is_left_out_is_named(width, left_out):
    text = printed(layers_table(report(), width), width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    for name in NAMES:
        (line,) = [line for line in lines if name in line]
        assert "545, 525" in line
        assert "0.978" in line
        assert "+0.00009" in line
        assert ("column-blocks" in line) == ("form" not in left_out)
        assert ("865,430" in line) == ("parameters" not in left_out)
        assert ("0.25" in line) == ("signal / noise" not in left_out)
    caption = " ".join(text.partition("too narrow for:")[2].split())
    assert bool(caption) == bool(left_out)
    for column in left_out:
        assert column in caption


def test_without_harmless_ranges_there_are_no_such_columns():
    text = printed(layers_table(report(harmless_range=None, predicted_change=None), 200), 200)
    assert "radius" not in text
    assert "too narrow" not in text


def test_a_layer_left_dense_has_no_rank():
    text = printed(layers_table(report(rank=None, second_rank=None, form=None), 200), 200)
    assert "dense" in text
    assert "None" not in text


def test_reasons_are_told_whole_on_a_narrow_terminal():
    text = " ".join(printed(not_factorized_table(report()), 60).split())
    assert "lm_head Linear its weight is shared with" in text
    assert "tied weights" in text


def test_the_side_whose_gram_was_kept_is_listed_where_it_is_one():
    assert "Gram of" not in printed(layers_table(report(whole_grams="both"), 200), 200)
    assert "outputs" in printed(layers_table(report(whole_grams="output"), 200), 200)
    assert "inputs" in printed(layers_table(report(whole_grams="input"), 200), 200)
