"""Whether README, tutorial and the how-to pages can be read: ``python -m benchmarks.readability``.

No sentence has more than 30 words, no paragraph more than 5 lines, no line more than 125
characters, no table more than 7 columns, and README no more than 150 lines. Code, and tables but
for their columns, are left out; an item of a list is a paragraph.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/index.md", "docs/tutorial.md", "docs/results.md", "docs/how-to/*.md"]
MOST_WORDS, MOST_LINES, LONGEST_LINE, MOST_COLUMNS, LONGEST_README = 30, 5, 125, 7, 150

_FENCE = re.compile(r"^ *```")
_RULE = re.compile(r"\|( *:?-+:? *\|)+")  # between a table's head and its rows
_ITEM = re.compile(r"^ *([-*]|\d+\.) +")
# The end of a sentence: a mark with what closes behind it, and a space or the paragraph's end.
_END = re.compile(r"(?<=[.!?])[)\"*_]*\s+|:\s*$")


def pages() -> list[Path]:
    """The pages that are held to it."""
    return [file for pattern in PAGES for file in sorted(ROOT.glob(pattern))]


def paragraphs(text: str) -> Iterator[tuple[int, list[str]]]:
    """Line number and lines of each paragraph or item of a list; no code, tables, titles."""
    found: list[str] = []
    start, in_code = 0, False
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        fence = _FENCE.match(line) is not None
        words = not (fence or in_code or line.lstrip().startswith(("|", "#", "<!--")))
        if found and (not words or not line.strip() or _ITEM.match(line)):
            yield start, found
            found = []
        if words and line.strip():
            start = start if found else number
            found.append(line)
        in_code ^= fence


def sentences(lines: list[str]) -> list[str]:
    """Of a paragraph, as they are read aloud: code is one word, of a link its words alone."""
    text = " ".join(_ITEM.sub("", line).strip() for line in lines)
    text = re.sub(r"`[^`]*`", "code", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return [sentence for sentence in _END.split(text) if sentence.strip()]


def troubles(name: str, text: str) -> Iterator[str]:
    """What is too long in a page, with its place."""
    for start, lines in paragraphs(text):
        if len(lines) > MOST_LINES:
            yield f"{name}:{start}: a paragraph of {len(lines)} lines; at most {MOST_LINES}"
        for sentence in sentences(lines):
            if (words := len(re.findall(r"\w\S*", sentence))) > MOST_WORDS:
                yield f"{name}:{start}: {words} words, at most {MOST_WORDS}: {sentence[:60]} ..."
        for number, line in enumerate(lines, start=start):
            if len(line) > LONGEST_LINE:
                yield f"{name}:{number}: {len(line)} characters; at most {LONGEST_LINE}"
    for number, line in enumerate(text.splitlines(), start=1):
        columns = line.count("|") - 1 if _RULE.fullmatch(line) else 0
        if columns > MOST_COLUMNS:
            yield f"{name}:{number}: a table of {columns} columns; at most {MOST_COLUMNS}"


def main() -> None:
    """Print what is too long, and exit with 1 if anything is."""
    found: list[str] = []
    for file in pages():
        text = file.read_text(encoding="utf-8")
        name = str(file.relative_to(ROOT))
        found += troubles(name, text)
        if name == "README.md" and (lines := len(text.splitlines())) > LONGEST_README:
            found.append(f"{name}: {lines} lines; at most {LONGEST_README}")
    print("\n".join(found) or f"{len(pages())} pages can be read")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
