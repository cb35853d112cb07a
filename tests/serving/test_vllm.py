"""vLLM opens what rankfold saves, and writes what transformers writes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import rankfold
from rankfold.errors import ArtifactError
from tests.serving.small_folders import FAMILIES, WORDS, factorized_folder, model_of
from tests.small_tokenizers import FAMILIES as TOKENIZERS

NEW = 8  # tokens
PROMPTS = [
    list(range(5, 25)),
    list(range(30, 40)),
    [7, 99, 3],
    [(11 * i) % WORDS for i in range(90)],
]


def opened(folder: Path, **settings: Any) -> Any:
    from vllm import LLM

    given = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 3}
    return LLM(model=str(folder), skip_tokenizer_init=True, **{**given, **settings})


def written(engine: Any, prompts: list[list[int]] = PROMPTS) -> list[Any]:
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(
        temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False, logprobs=3
    )
    asked = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
    return [one.outputs[0] for one in engine.generate(asked, sampling, use_tqdm=False)]


def farthest(folder: Path, outputs: list[Any], dtype: str = "float32", prompts=PROMPTS) -> float:
    """The largest difference of log-probabilities from transformers', after the same tokens."""
    model = rankfold.load(folder).to(getattr(torch, dtype))
    model.set_attn_implementation("eager")  # the one that caps what is to be capped
    worst = 0.0
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + list(output.token_ids)])).logits[0]
        expected = logits.float().log_softmax(-1)[len(prompt) - 1 : -1]
        # Where the best token is another one, by how much it is better.
        ahead = expected.max(-1).values - expected[range(NEW), list(output.token_ids)]
        differ = [
            abs(float(row[token]) - found.logprob)
            for row, one in zip(expected, output.logprobs, strict=True)
            for token, found in one.items()
        ]
        worst = max(worst, float(ahead.max()), *differ)
    return worst


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_every_form(family: str, tmp_path: Path) -> None:
    folder = factorized_folder(tmp_path / "model", model_of(family))
    assert farthest(folder, written(opened(folder))) < 1e-3


@pytest.mark.parametrize("form", ["pair", "pivoted"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2"])  # untied and tied
def test_factorized_embeddings(family: str, form: str, tmp_path: Path) -> None:
    folder = factorized_folder(tmp_path / "model", model_of(family), embeddings=form)
    assert farthest(folder, written(opened(folder))) < 1e-3


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.2), ("float16", 0.03)])
def test_half_precision(dtype: str, bound: float, tmp_path: Path) -> None:
    folder = factorized_folder(tmp_path / "model", model_of("Llama"), embeddings="pivoted")
    assert farthest(folder, written(opened(folder, dtype=dtype)), dtype) < bound


def test_prefixes_are_kept_and_texts_share_batches(tmp_path: Path) -> None:
    folder = factorized_folder(tmp_path / "model", model_of("Llama"))
    engine = opened(folder, enable_prefix_caching=True, max_model_len=256)
    shared = [(7 * i) % WORDS for i in range(200)]
    prompts = [*PROMPTS, *([*shared, i] for i in range(5)), shared[:130]]
    first, again = written(engine, prompts), written(engine, prompts)
    assert farthest(folder, first, prompts=prompts) < 1e-3
    assert [o.token_ids for o in first] == [o.token_ids for o in again]


@pytest.mark.parametrize("family", ["Llama", "StableLm"])
def test_models_that_transformers_runs(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # vLLM changes transformers' classes for good: not in this process.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    FAMILIES.setdefault("StableLm", {})
    folder = factorized_folder(tmp_path / "model", model_of(family))
    assert farthest(folder, written(opened(folder, model_impl="transformers"))) < 1e-3


def test_compiled(tmp_path: Path) -> None:
    folder = factorized_folder(tmp_path / "model", model_of("Llama", num_hidden_layers=2))
    assert farthest(folder, written(opened(folder, enforce_eager=False))) < 1e-3


def test_two_processes_share_each_layer(tmp_path: Path) -> None:
    """Queries are shared, the one head of keys and values is on both."""
    model = model_of("Llama", num_attention_heads=4, hidden_size=128)
    folder = factorized_folder(tmp_path / "model", model, embeddings="pivoted")
    engine = opened(folder, tensor_parallel_size=2, distributed_executor_backend="mp")
    assert farthest(folder, written(engine)) < 1e-3


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    FAMILIES.setdefault("StableLm", {})
    folder = factorized_folder(tmp_path / "model", model_of("StableLm"))
    with pytest.raises(ArtifactError, match=r"StableLmForCausalLM.*model_impl=\"transformers\""):
        opened(folder, model_impl="vllm")


def test_other_weights_are_refused(tmp_path: Path) -> None:
    folder = factorized_folder(tmp_path / "model", model_of("Llama"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match="not those that were saved"):
        opened(folder)


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    folder = factorized_folder(tmp_path / "model", model_of("Llama"))
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".left"))
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = folder / "config.json"  # as transformers saves again: no digest holds any more
    said = json.loads(config.read_text())
    del said["transformers_weights"]
    config.write_text(json.dumps(said))
    with pytest.raises(Exception, match=f"lack {name}"):
        opened(folder)


def test_an_old_vllm_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    folder = factorized_folder(tmp_path / "model", model_of("Llama"))
    monkeypatch.setattr(vllm, "__version__", "0.11.2")
    with pytest.raises(Exception, match=r"vLLM 0\.11\.2 is installed.*0\.32 or newer"):
        opened(folder)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """``vllm serve`` on a port of its own, with a tokenizer; ended as by Ctrl-C."""
    tokenizer = TOKENIZERS["gpt2"]()
    folder = factorized_folder(tmp_path / "model", model_of("Llama", vocab_size=len(tokenizer)))
    tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("vllm")), "serve", str(folder), "--dtype", "float32",
        "--enforce-eager", "--host", "127.0.0.1", "--port", str(port),
        "--served-model-name", "small", "--max-model-len", "128", "--max-num-seqs", "4",
    ]  # fmt: skip
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ))
    try:
        until = time.monotonic() + 200
        while time.monotonic() < until and process.poll() is None:
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        if process.poll() is not None:
            log.seek(0)
            pytest.fail(log.read()[-3000:])
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.send_signal(2)
        process.wait(60)
        log.close()


def test_a_server_that_an_openai_client_asks(server: str, tmp_path: Path) -> None:
    import openai

    with openai.OpenAI(base_url=server, api_key="none") as client:
        done = client.completions.create(
            model="small", prompt=[3, 4, 5], max_tokens=5, temperature=0,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )  # fmt: skip
    found = done.choices[0].token_ids  # type: ignore[attr-defined]
    model = rankfold.load(tmp_path / "model")
    expected = model.generate(
        torch.tensor([[3, 4, 5]]), max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    assert found == expected[0, 3:].tolist()
