"""The invariant: a name of a layer, a file or a label is shown as it is, wherever it is shown, and
finds what it names."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

from rankfold.cli.app import app, as_options
from rankfold.cli.tables import (
    curve_table,
    layers_table,
    not_factorized_table,
    plain_console,
    print_curve,
)
from rankfold.errors import UNSEEN, visible
from rankfold.machine.progress import TerminalProgress
from rankfold.model.find_layers import find_layers
from rankfold.report.model_card import as_code, as_shown

ODD = [
    "conv [3x3]", "[bold]", "[/b]", "[/]", "a[link=x]b", ":smile:", "users/items", "größe", "a b",
    "\x1b[31mred", "bell\x07", "line\nfeed", "tab\t", "\u202egnp.exe", "\u2066x\u2069", "\u2028",
    "\ufeffx", "\x9b5m", "back\x08space", "seed=3", "*", "?", "[!a]", "{a,b}", "<script>", "&amp;",
    "`code`", "|", "\\n", "%s", "{0}", "日本", "\u200d", "\udcff",
    "\u200b", "\u2060", "\u3164", "\xad", "\U000e0041", "e\u0301", "\u2764\ufe0f",
]  # fmt: skip
NAMES = strategies.one_of(
    strategies.sampled_from(ODD),
    strategies.text(min_size=1, max_size=12).filter(lambda text: text.strip() != ""),
)


def printed(show: Any, width: int = 400) -> str:
    out = io.StringIO()
    show(plain_console(out, width=width))
    return out.getvalue()


@settings(deadline=None)
@given(text=NAMES)
def test_what_is_shown_says_which_characters_there_are(text: str) -> None:
    shown = visible(text)
    assert not UNSEEN.search(shown)
    shown.encode()
    assert visible(shown) == shown
    assert (shown == text) == (not UNSEEN.search(text))
    undone = UNSEEN.sub(lambda found: ascii(found[0])[1:-1], text)
    assert shown == undone
    assert visible(f"{text}\n", lines=True).endswith("\n")


def report(name: str, reason: str) -> dict[str, Any]:
    layer = {
        "name": name, "kind": "Linear", "shape": [3, 4], "rank": 2, "form": "pair", "full_rank": 3,
        "parameters": 12, "factorized_parameters": 14, "predicted_change": 0.1,
        "predicted_by_rank": [[1, 0.5]],
    }  # fmt: skip
    left = {"name": name, "kind": "Conv", "reason": reason}
    return {"layers": [layer], "not_factorized": [left], "settings": {"objective": "kronecker"}}


@settings(deadline=None)
@given(name=NAMES)
def test_tables_show_every_name_and_find_it(name: str) -> None:
    made = report(name, f"its weight is shared with {name}: tied weights stay as they are")
    shown = visible(name).strip()
    assert shown in printed(lambda console: console.print(layers_table(made, 400)))
    assert printed(lambda console: console.print(not_factorized_table(made))).count(shown) >= 2
    for asked in (name, visible(name)):
        assert shown in printed(lambda console, asked=asked: print_curve(console, made, asked))
        assert curve_table(made, asked)[0]["name"] == name


@settings(deadline=None)
@given(name=NAMES)
def test_a_stage_is_shown_by_its_name(name: str) -> None:
    out = io.StringIO()
    console = Console(file=out, width=400, markup=False, emoji=False)
    assert [*TerminalProgress(console).track([1], name, 1)] == [1]
    assert visible(name).rstrip() in out.getvalue()
    assert not TerminalProgress().console._markup


def test_a_long_title_is_one_line() -> None:
    name = "runs [lr=0.1] " * 30
    text = printed(lambda console: print_curve(console, report(name, ""), name), width=60)
    assert f"{name}: rank 2 of 3\n" in text


@settings(max_examples=50, deadline=None)
@given(names=strategies.lists(NAMES, min_size=2, max_size=4, unique=True))
@example(names=["conv [3x3]", "conv 3"])
@example(names=["a*", "ab"])
def test_an_exact_name_always_matches(names: list[str]) -> None:
    names = [name.replace(".", "_") for name in names]
    free = [name for name in names if not hasattr(nn.ModuleDict, name)]
    parts = nn.ModuleDict({name: nn.Linear(3, 3) for name in free})
    model = nn.ModuleDict({"parts": parts})
    for name in parts:
        for pattern in (f"parts.{name}", visible(f"parts.{name}")):
            assert f"parts.{name}" in find_layers(model, include=[pattern])[0]
            if len(parts) > 1:
                left = find_layers(model, exclude=[pattern])[1] if not _all(parts, pattern) else []
                assert all(s.reason == "excluded" for s in left)


def _all(parts: nn.ModuleDict, pattern: str) -> bool:
    """Whether the name, read as a pattern, matches all there are."""
    return len(find_layers(nn.ModuleDict({"parts": parts}), include=[pattern])[0]) == len(parts)


@pytest.mark.parametrize(
    "path",
    [
        "runs/seed=3", "runs/[seed=3]/out", "my seed=3/out", "seed=3", "a,size=0.8", "limit=5.csv",
        "x/overwrite=True", "batch_size=4 lr=1",
    ],
)  # fmt: skip
def test_what_the_user_gave_stays_as_it_is(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(as_options.__globals__, "_given", [path])
    assert as_options(f"no such folder: {path}; overwrite=True replaces one.") == (
        f"no such folder: {path}; --overwrite replaces one."
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("conv [3x3](x)", r"conv \[3x3\](x)"),
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("a\n# b", r"a\\n\# b"),
        ("a|b `c` *d*", r"a\|b \`c\` \*d\*"),
        ("timm:resnet18_v2,num_classes=4", "timm:resnet18_v2,num_classes=4"),
        ("\u202egnp", r"\\u202egnp"),
    ],
)
def test_markdown_shows_a_name_as_it_is(text: str, shown: str) -> None:
    assert as_shown(text) == shown


def test_markdown_shows_code_as_it_is() -> None:
    assert as_code("a=1") == "`a=1`"
    assert as_code("include=('`x``',)") == "``` include=('`x``',) ```"
    assert "\n" not in as_code("a\nb")


CODE = """
import torch
from torch import nn
NAMES = {names!r}
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({{name: nn.Linear(12, 12) for name in NAMES}})
    def forward(self, x):
        for part in self.parts.values():
            x = part(torch.relu(x))
        return x
def make():
    torch.manual_seed(0)
    return Net()
def data():
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (80,), generator=g)
    return [(torch.randn(12, generator=g), int(label)) for label in labels]
"""


def test_the_command_line_shows_and_finds_every_name(tmp_path: Path) -> None:
    names = [name for name in ODD if "." not in name and name != "\udcff"][:18]
    folder = tmp_path / "seed=3 [bold]" / "c ["
    folder.mkdir(parents=True)
    (folder / "odd_net.py").write_text(CODE.format(names=names), encoding="utf-8")
    spec = f"{folder}/odd_net.py"
    exact = ("--include", f"parts.{names[0]}", "--include", f"parts.{visible(names[9])}")
    made = CliRunner().invoke(
        app,
        ["lossless", f"{spec}:make", "--data", f"{spec}:data", "--size", "0.98", "--out",
         str(folder / "out"), "--no-gradient-step", "--no-refit", *exact],
    )  # fmt: skip
    assert made.exit_code == 0, made.stderr
    assert f"opening {spec}:make\n" in made.stderr
    assert f"{spec}:make: lossless\n" in made.stdout
    assert f"saved: {folder / 'out'}\n" in made.stdout
    listed = CliRunner().invoke(app, ["inspect", str(folder / "out")])
    for name in names:
        assert f"parts.{visible(name)}" in listed.stdout
    found = CliRunner().invoke(app, ["inspect", str(folder / "out"), "--json"])
    assert not UNSEEN.search(found.stdout.replace("\n", ""))
    written = json.loads(found.stdout)
    assert {e["name"] for e in written["layers"]} == {f"parts.{names[0]}", f"parts.{names[9]}"}
    assert {e["name"] for e in written["not_factorized"]} == {f"parts.{n}" for n in names} - {
        e["name"] for e in written["layers"]
    }
    wrong = CliRunner().invoke(app, ["inspect", str(folder / "nothing seed=3")])
    assert wrong.exit_code == 2
    assert str(folder / "nothing seed=3") in wrong.stderr
