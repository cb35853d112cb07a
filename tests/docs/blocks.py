"""The code blocks of a page, and the files that pages speak of as the user's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import transformers
from tokenizers import processors

from tests.tiny_language_model import TEXT, save_tiny_llama, tiny_tokenizer

ROOT = Path(__file__).parents[2]
PATTERNS = (
    "README.md",
    "docs/index.md",
    "docs/tutorial.md",
    "docs/how-to/*.md",
    "docs/reference/*.md",
)
PAGES = [file for pattern in PATTERNS for file in sorted(ROOT.glob(pattern))]

RUN, FILE, NOT_RUN, LONG = "run", "file", "not run", "long"
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>file|not run|long): (?P<words>[^>]+) -->\n)?"
    r"^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """What stands between two fences.

    Attributes:
        mark: What the comment before it says is done with it; without one it is run.
        words: A file's name, or why it is not run, or what it takes.
    """

    line: int
    language: str
    text: str
    mark: str
    words: str


def blocks(page: Path) -> list[Block]:
    whole = page.read_text(encoding="utf-8")
    return [
        Block(
            whole[: match.start("language")].count("\n") + 1,
            match["language"],
            match["text"],
            match["mark"] or RUN,
            match["words"] or "",
        )
        for match in _BLOCK.finditer(whole)
    ]


def commands(block: Block) -> list[str]:
    """The lines of a block of the shell, without what is said behind them."""
    lines = (re.sub(r"\s+#\s.*$", "", line).strip() for line in block.text.splitlines())
    return [line for line in lines if line]


def _my_model(folder: Path) -> None:
    save_tiny_llama(folder / "my-model")
    (folder / "texts.txt").write_text(TEXT[:9000], encoding="utf-8")


def _my_encoder(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", tokenizer.eos_token_id)]
    )
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder / "my-encoder")
    tokenizer.save_pretrained(folder / "my-encoder")
    whole = " ".join(topics["compound"].split())
    lines = {text.strip()[:40] for text in whole.split(". ") if len(text) > 30}
    (folder / "sentences.txt").write_text("\n".join(sorted(lines)), encoding="utf-8")


# What a page takes for granted in the reader's folder.
GIVEN: dict[str, Callable[[Path], None]] = {
    "chat-model.md": _my_model,
    "sentence-encoder.md": _my_encoder,
}
