"""``run.toml`` repeats a run; what commands print as JSON is as their schemas say."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings, strategies
from typer.testing import CliRunner

from rankfold.cli.app import _ended, all_commands, app
from rankfold.cli.config import RUN_FILE, config_text, read_config, tomllib
from rankfold.cli.outputs import OUTPUTS, schema_of
from rankfold.cli.schema import NAMES
from rankfold.errors import InputError
from rankfold.files.folder import written
from rankfold.machine.interruption import Interruption
from tests.command_line import make_project

RUN = (
    "lossless", "net.py:net", "--weights", "net.safetensors", "--data", "data.npz", "--size", "0.7",
    "--effort", "fast", "--limit", "60", "--selection-limit", "40", "--held-out-limit", "60",
    "--exclude", "conv", "--set", "damping=.2", "--no-shrinkage",
)  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def run(project: Path) -> Callable[..., Any]:
    def called(*words: object, expect: int = 0) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(project)
            done = CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "400"})
        assert done.exit_code == expect, done.output
        return done

    called("--version")
    return called


@pytest.fixture(scope="module")
def first(project: Path, run: Callable[..., Any]) -> Path:
    """The folder of a run."""
    run(*RUN, "--out", "first")
    return project / "first"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_repeated_run_gives_the_same_bytes(first: Path, run: Callable[..., Any]) -> None:
    run("lossless", "--config", "first/run.toml", "--out", "again")
    before, after = contents(first), contents(first.parent / "again")
    options, others = before.pop(RUN_FILE), after.pop(RUN_FILE)
    for measured in ("seen.json", "report.html"):  # times are in these, and in no other
        assert before.pop(measured) and after.pop(measured)
    assert before == after
    assert options.replace(b'out = "first"', b'out = "again"') == others
    assert RUN_FILE in json.loads(before["rankfold.json"])["files"]


def test_the_command_line_goes_before_the_file(first: Path, run: Callable[..., Any]) -> None:
    words = ("--out", "smaller", "--size", "0.5", "--shrinkage", "--json", "--quiet")
    done = run("lossless", "--config", "first/run.toml", *words)
    report = json.loads(done.stdout)
    assert report["target"]["size"] == 0.5
    assert report["settings"]["shrinkage"] is True
    assert report["settings"]["damping"] == 0.2
    found = tomllib.loads((first.parent / "smaller" / RUN_FILE).read_text())
    assert (found["size"], found["out"], found["shrinkage"]) == (0.5, "smaller", True)
    assert done.stderr == ""


def test_an_earlier_result_is_not_overwritten(first: Path, run: Callable[..., Any]) -> None:
    run("lossless", "--config", "first/run.toml", "--overwrite")
    done = run("lossless", "--config", "first/run.toml", expect=2)
    assert "exists and is not empty" in done.stderr


REFUSED = {
    "sice = 0.3": r"lossless has no option 'sice'.*expected some of model, .*size",
    "json = true": "no option 'json'",
    'set = ["damping=.2"]': "no option 'set'",
    'command = "compact"': "holds the options of 'compact', and this is lossless",
    "size = [0.3]": r"size is \[0.3\]; expected a text, a number",
    "size = true": "size is True; expected a text or a number",
    "size = 2020-01-01": "size is datetime",
    'shrinkage = "yes"': "shrinkage is 'yes'; expected true or false",
    'exclude = "conv"': "exclude is 'conv'; expected a list of texts",
    "exclude = [1]": "expected a list of texts",
    "size = ": "is no TOML",
    "size = 1\nsize = 2": "is no TOML",
    "'''": "is no TOML",
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_option_is_refused(text: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    (tmp_path / "bad.toml").write_text(text)
    done = run("lossless", "--config", tmp_path / "bad.toml", expect=2)
    assert re.search(REFUSED[text], done.stderr), done.stderr
    assert "bad.toml" in done.stderr and done.stdout == ""


def test_a_file_that_is_not_there_or_no_text_is_named(
    tmp_path: Path, run: Callable[..., Any]
) -> None:
    assert "nowhere.toml" in run("lossless", "--config", "nowhere.toml", expect=2).stderr
    (tmp_path / "bad.toml").write_bytes(b"\xff\xfe")
    done = run("lossless", "--config", tmp_path / "bad.toml", expect=2)
    assert "is no TOML" in done.stderr


def test_values_are_checked_as_those_that_are_typed(
    tmp_path: Path, run: Callable[..., Any]
) -> None:
    (tmp_path / "bad.toml").write_text('size = "x"')
    assert "--size" in run("lossless", "m", "--config", tmp_path / "bad.toml", expect=2).stderr
    (tmp_path / "bad.toml").write_text('model = "m"\nsize = 2\ndata = "x"\nout = "o"')
    done = run("lossless", "--config", tmp_path / "bad.toml", expect=2)
    assert "the size is 2.0" in done.stderr


TEXTS = strategies.text(max_size=20)
VALUES: dict[str, strategies.SearchStrategy[Any]] = {
    "model": TEXTS,
    "data": TEXTS,
    "size": strategies.floats(allow_nan=False, allow_infinity=False),
    "limit": strategies.integers(-(1 << 62), 1 << 62) | strategies.none(),
    "shrinkage": strategies.booleans(),
    "exclude": strategies.lists(TEXTS, min_size=1, max_size=3),
}


@settings(deadline=None, max_examples=60)
@given(values=strategies.fixed_dictionaries(VALUES))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]
) -> None:
    file = tmp_path_factory.getbasetemp() / "written.toml"
    file.write_bytes(config_text("lossless", values).encode())
    found = read_config(file, "lossless", all_commands()["lossless"].params)
    given = {name: value for name, value in values.items() if value is not None}
    numbers = {"size": float, "limit": int}
    assert {name: numbers.get(name, lambda same: same)(found[name]) for name in found} == given
    assert ("limit" in found) == (values["limit"] is not None)


def test_a_path_that_is_no_text_is_named_and_left_out() -> None:
    text = config_text("lossless", {"model": "a\udcffb", "size": 0.5})
    assert tomllib.loads(text) == {"command": "lossless", "size": 0.5}
    assert "# Without a value: model" in text


# What each command prints for a real artifact is as its schema says.
COMMANDS = {
    "inspect": ("first",),
    "evaluate": ("first", "--model", "net.py:net", "--data", "data.npz", "--limit", "50"),
    "export": ("first", "--model", "net.py:net", "--to", "dense", "--out", "dense"),
    "doctor": (),
}


def checked(name: str, done: Any) -> Any:
    value = json.loads(done.stdout)
    msgspec.convert(value, OUTPUTS[name])
    assert {*schema_of(name)["$defs"][OUTPUTS[name].__name__]["required"]} <= {*value}
    return value


@pytest.mark.parametrize("name", COMMANDS)
def test_outputs_are_as_their_schemas_say(name: str, first: Path, run: Callable[..., Any]) -> None:
    checked(name, run(name, *COMMANDS[name], "--json"))


def test_results_are_as_their_schemas_say(first: Path, run: Callable[..., Any]) -> None:
    config = ("--config", "first/run.toml", "--json", "--out")
    assert checked("lossless", run("lossless", *config, "json"))["saved"] == "json"
    text = (first / RUN_FILE).read_text().replace('"lossless"', '"compact"')
    text = "\n".join(line for line in text.splitlines() if not line.startswith("size"))
    (first.parent / "compact.toml").write_text(text)
    done = run("compact", "--config", "compact.toml", "--margin", "0.3", "--json", "--out", "small")
    checked("compact", done)


def test_several_sizes_on_one_part_say_so(
    first: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKFOLD_OPENINGS", str(first.parent / "openings"))
    config = ("lossless", "--config", "first/run.toml", "--size")
    assert "opened:" not in run(*config, "0.65", "--out", "one").stdout
    said = run(*config, "0.45", "--out", "two").stdout
    assert "opened: 1 other models were certified before on 60 of these examples" in said
    assert "with a chance of up to 10%, not 5%" in said
    report = json.loads(run(*config, "0.4", "--out", "three", "--json").stdout)
    assert report["history"]["others"] == 2


def test_a_verification_is_as_its_schema_says(first: Path, run: Callable[..., Any]) -> None:
    words = ("verify", "first", "--model", "net.py:net", "--data", "data.npz", "--json")
    assert checked("verify", run(*words))["agrees"] is True


def test_an_error_is_an_object_too(run: Callable[..., Any]) -> None:
    done = run("evaluate", "nowhere", "--data", "x", "--json", expect=2)
    error = checked("error", done)["error"]
    assert (error["code"], error["kind"]) == (2, "bad input")
    assert error["message"] in done.stderr


def test_an_interruption_is_an_object_too(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise Interruption(15)

    assert _ended(interrupted, len(written()), as_json=True) == 143
    said = capsys.readouterr()
    error = msgspec.convert(json.loads(said.out), OUTPUTS["error"]).error  # type: ignore[attr-defined]
    assert (error.code, error.kind, error.message) == (143, "interrupted", said.err.strip())


def test_schemas_are_printed(run: Callable[..., Any]) -> None:
    assert tuple(run("schema").stdout.split()) == NAMES == tuple(OUTPUTS)
    for name in NAMES:
        assert json.loads(run("schema", name).stdout) == schema_of(name)
    assert "expected lossless" in run("schema", "nothing", expect=2).stderr


def test_quiet_and_verbose(first: Path, run: Callable[..., Any]) -> None:
    words = ("evaluate", "first", "--model", "net.py:net", "--data", "data.npz", "--limit", "50")
    assert run(*words, "--quiet").stderr == ""
    loud = run(*words, "--verbose").stderr
    for said in ("INFO rankfold ", "torch ", "threads", "limit = 50", "GB of memory at most"):
        assert said in loud
    assert "INFO" not in run(*words).stderr
    assert "contradict each other" in run(*words, "--quiet", "--verbose", expect=2).stderr
    done = run("evaluate", "nowhere", "--data", "x", "--quiet", expect=2)
    assert "no such folder: nowhere" in done.stderr


def test_the_context_of_a_completion_reads_no_file() -> None:
    made = all_commands()["lossless"]
    context = made.make_context("lossless", ["--config", "nowhere"], resilient_parsing=True)
    assert context.default_map is None


def test_extras_that_are_missing_are_named(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rankfold.cli import facts

    monkeypatch.setattr(facts, "_version", lambda name: None if name == "timm" else "1.0")
    monkeypatch.setenv("RANKFOLD_OPENINGS", "off")
    said = run("doctor").stdout
    assert "missing timm: pip install 'rankfold[vision]'" in said
    assert "record of openings: turned off by RANKFOLD_OPENINGS" in said
    monkeypatch.setenv("RANKFOLD_OPENINGS", "some/where")
    assert "record of openings: some/where (not there yet)" in run("doctor").stdout


@pytest.mark.parametrize(
    ("total", "limits", "expected"),
    [(100, ["max"], None), (100, ["30"], 30), (100, ["30", "20"], 20), (100, ["900"], None)],
)
def test_the_limit_of_a_container_is_found(
    total: int, limits: list[str], expected: int | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from rankfold.cli import facts

    files = [tmp_path / str(number) for number in range(len(limits))]
    for file, text in zip(files, limits, strict=True):
        file.write_text(f"{text}\n")
    monkeypatch.setattr(facts, "LIMITS", (*files, tmp_path / "none"))
    assert facts._container_limit(total) == expected


def test_a_config_is_refused_before_anything_is_imported() -> None:
    with pytest.raises(InputError, match="no such file"):
        read_config(Path("nowhere"), "lossless", [])
