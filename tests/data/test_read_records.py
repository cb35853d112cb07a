"""Records in are records out: a table is read as the tool that wrote it meant it, or refused."""

from __future__ import annotations

import csv
import json
import math
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankfold.data.account import ReadExamples
from rankfold.data.record_examples import record_examples
from rankfold.data.sources import numbers, read_records
from rankfold.errors import InputError
from tests.small_tokenizers import FAMILIES

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

COLUMNS = dict.fromkeys(("text", "label", "target", "tokens", "tags"))
FEW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# What breaks readers by lines: quotes, separators, and all that Python takes for an end of line.
ODD = st.text(alphabet=st.one_of(st.sampled_from("\"',;\t\n\r\x0b\x0c\x1c\x85\u2028\u2029\ufeff a"),
                                 st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
              max_size=12)  # fmt: skip
ROWS = st.lists(st.tuples(ODD, ODD), min_size=1, max_size=6)


def _write(file: Path, text: str) -> Path:
    file.write_bytes(text.encode())
    return file


def _csv(rows: list[tuple[str, ...]], delimiter: str = ",", **more: Any) -> str:
    written = StringIO(newline="")
    csv.writer(written, delimiter=delimiter, **more).writerows(rows)
    return written.getvalue()


@FEW
@given(rows=ROWS, end=st.sampled_from(["\n", "\r\n"]))
def test_a_table_is_what_was_written(rows: list[tuple[str, str]], end: str, tmp_path: Path) -> None:
    # Python's writer leaves a lone \r without quotes where lines end in \n.
    quoting = csv.QUOTE_ALL if end == "\n" else csv.QUOTE_MINIMAL
    text = _csv([("text", "other"), *rows], lineterminator=end, quoting=quoting)
    found = read_records(_write(tmp_path / "x.csv", text))
    assert [(record["text"], record["other"]) for record in found] == rows


@FEW
@given(rows=ROWS, ascii_=st.booleans())
def test_json_lines_are_what_was_written(
    rows: list[tuple[str, str]], ascii_: bool, tmp_path: Path
) -> None:
    records = [{"text": text, "other": other} for text, other in rows]
    text = "".join(json.dumps(record, ensure_ascii=ascii_) + "\n" for record in records)
    assert read_records(_write(tmp_path / "x.jsonl", text)) == records
    assert read_records(_write(tmp_path / "y.jsonl", text.replace("\n", "\r\n"))) == records
    assert read_records(_write(tmp_path / "z.jsonl", f"\ufeff\n{text}\n")) == records


@FEW
@given(
    rows=st.lists(
        st.tuples(*[ODD.filter(lambda text: not set(text) & set("\t\n\r"))] * 2), min_size=1
    )
)
def test_a_tsv_without_quoting_keeps_every_row(rows: list[tuple[str, str]], tmp_path: Path) -> None:
    """Texts with quotes of their own, as the GLUE data sets have them, or values in quotes."""
    lines = ["text\tother", *("\t".join(row) for row in rows)]
    found = read_records(_write(tmp_path / "x.tsv", "\n".join(lines) + "\n"))
    assert len(found) == len(rows)
    for record, row in zip(found, rows, strict=True):
        for value, written in zip(record.values(), row, strict=True):
            assert value in (written, written[1:-1].replace('""', '"'))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('a\tb\n"Good film\t1\nbad\t0\n', ['"Good film', "bad"]),
        ('a\tb\n"Good\t1\nbad"\t0\n', ['"Good', 'bad"']),
        ('a\tb\nsay "hi\t1\n"x" y\t0\n', ['say "hi', '"x" y']),
        ('a\tb\n"one\n\ntwo"\t1\n', ["one\n\ntwo"]),
        ('a\tb\n"a ""b"""\t1\r\n"c\td"\t0\r\n', ['a "b"', "c\td"]),
        ('a\tb\n5" wide\t1\n', ['5" wide']),
        ('a\tb\n"\t1\nx\t0\n', ['"', "x"]),
    ],
)
def test_quotes_of_a_tsv(text: str, wanted: list[str], tmp_path: Path) -> None:
    found = read_records(_write(tmp_path / "x.tsv", text))
    assert [record["a"] for record in found] == wanted
    assert any("quotes" in note for note in found.notes) == ('\n"' in text)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", 'a,b\n"x" y,1\n', "line 2 of .* can't be read as a table"),
        ("x.csv", 'a,b\n"x,1\ny,2\n', "can't be read as a table: unexpected end of data"),
        ("x.csv", "a,b\n1,2\n3\n", r"row 3 of .* has 1 values for 2 columns"),
        ("x.csv", 'a,b\n"1\n2",3\n4\n', r"row 3 of .*It ends in line 4"),
        ("x.csv", "a,a\n1,2\n", "has 2 columns called 'a'"),
        ("x.csv", "a,b\n", "holds no record"),
        ("x.tsv", "a\tb\n1\n", "row 2 of .* has 1 values"),
        ("x.tsv", 'a\tb\n"1\t2\n3\n', "can't be read as a table"),
        ("x.jsonl", '{"a": 1, "a": 2}\n', "line 1 of .*the name 'a' stands twice"),
        ("x.jsonl", '{"a": 1}\n{"a": 2\n', "line 2 of .* is not valid JSON"),
        ("x.jsonl", '{"a": ' + "[" * 100_000 + "\n", "line 1 of .* is not valid JSON"),
        ("x.jsonl", '{"a": ' + "9" * 5000 + "}\n", "line 1 of .* is not valid JSON"),
        ("x.jsonl", '[{"a": 1}]\n', "is a list; expected a JSON object"),
    ],
)
def test_what_is_no_table_is_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"(?s){message}"):
        read_records(_write(tmp_path / name, text))


def test_long_values_are_read_and_the_limit_stays(tmp_path: Path) -> None:
    limit, long = csv.field_size_limit(), "word " * 60_000
    for name, mark in (("x.csv", ","), ("x.tsv", "\t")):
        found = read_records(_write(tmp_path / name, _csv([("a", "b"), (long, '"')], mark)))
        assert found[0]["a"] == long
    assert csv.field_size_limit() == limit


def test_two_columns_of_a_name_in_arrow_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["a", "a"])
    file = tmp_path / "x.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(InputError, match="has 2 columns called 'a'"):
        read_records(file)
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(InputError, match="can't be read as Arrow data: Multiple matches"):
        read_records(tmp_path / "x.parquet")


TEXTS = st.one_of(st.none(), st.sampled_from(["", " ", "\n\t", "the film", "bad"]), ODD)


def _files(folder: Path, rows: list[tuple[str | None, int]]) -> list[Path]:
    records = [{"text": text, "label": label} for text, label in rows]
    files = [folder / name for name in ("x.jsonl", "x.csv", "x.parquet")]
    _write(files[0], "".join(json.dumps(record) + "\n" for record in records))
    _write(files[1], _csv([("text", "label"), *((t or "", str(y)) for t, y in rows)]))
    pq.write_table(pa.Table.from_pylist(records, schema=pa.schema(
        [("text", pa.string()), ("label", pa.int64())])), files[2])  # fmt: skip
    return files


@settings(FEW, max_examples=25)
@given(
    rows=st.lists(st.tuples(TEXTS, st.integers(0, 2)), min_size=1, max_size=8),
    task=st.sampled_from(["classification", "embedding", "causal-lm", "masked-lm", "regression"]),
)
def test_every_record_is_an_example_or_told(
    rows: list[tuple[str | None, int]], task: str, tmp_path: Path
) -> None:
    """Of all sources alike; what an example holds is what the tokenizer writes for that record."""
    tokenizer = FAMILIES["bert"]()
    for file in _files(tmp_path, rows):
        try:
            found = record_examples(file, tokenizer, 9, task=task, columns=COLUMNS)
        except InputError as error:
            assert "none of the" in str(error)
            continue
        assert isinstance(found, ReadExamples)
        left = [place for places in found.account.left_out.values() for place in places]
        assert found.account.given == len(rows) == len(found) + len(left)
        assert len({*left}) == len(left) and found.account.used == len(found)
        kept = [row for place, row in enumerate(rows) if place not in left]
        assert all(text is not None and text.strip() for text, _ in kept)
        for example, (text, label) in zip(found, kept, strict=True):
            ids = tokenizer(text, truncation=True, max_length=9)["input_ids"]
            if task in ("classification", "regression"):
                assert float(example["labels"]) == label
            if task != "masked-lm":
                held = example if task == "causal-lm" else example["input_ids"]
                assert held.tolist() == ids
        for place in left:
            text = rows[place][0]
            assert not (text or "").strip() or tokenizer(text)["input_ids"] in ([2, 3], [2, 1, 3]) \
                or task == "masked-lm"  # fmt: skip


def test_what_is_missing_is_told_by_its_number(tmp_path: Path) -> None:
    rows = [("bad", "1"), ("", "0"), ("film", ""), (" ", "1"), ("good", "nan"), ("the", "0")]
    file = _write(tmp_path / "x.csv", _csv([("text", "label"), *rows[:4], rows[5]]))
    found = record_examples(file, FAMILIES["bert"](), 9, task="classification", columns=COLUMNS)
    assert isinstance(found, ReadExamples)
    assert found.account.left_out == {"without text": [1, 3], "without label": [2]}
    lines = found.account.lines()
    assert lines[0].endswith("5 records, 2 of them used; each is one example of 3 tokens")
    assert "left out, without text: 2 records (numbers from 0: 1, 3)" in lines
    assert "labels: '0' is class 0 (1); '1' is class 1 (1)" in lines
    _write(file, _csv([("text", "label"), ("", "1"), ("film", "")]))
    with pytest.raises(InputError, match=r"none of the 2 records .*1 without text; 1 without lab"):
        record_examples(file, FAMILIES["bert"](), 9, task="classification", columns=COLUMNS)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": 5}, "holds '5' in record 0, a int; expected texts"),
        ({"text": True}, "a bool; expected texts"),
        ({"text": ["a"]}, "a list; expected texts"),
        ({"text": "a \ud800"}, "lone surrogate"),
    ],
)
def test_what_is_no_text_is_refused(record: Any, message: str, tmp_path: Path) -> None:
    file = _write(tmp_path / "x.jsonl", json.dumps(record))
    with pytest.raises(InputError, match=message):
        record_examples(file, FAMILIES["bert"](), 9, task="embedding", columns=COLUMNS)


@pytest.mark.parametrize("value", [math.nan, "inf", "1e999", "", None, "1,5", [1], 10**400])
def test_what_is_no_finite_number_is_named(value: object) -> None:
    with pytest.raises(InputError, match="in record 7; expected numbers"):
        numbers(Path("x"), "a", [1, value], [3, 7])
