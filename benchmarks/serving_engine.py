"""One model in vLLM, asked through pipes: ``benchmarks.serving`` starts one of these a model.

Each line of the input is a JSON object: ``prompts`` (lists of ids), ``tokens`` (to be written for
each) and ``check`` (whether transformers writes the same). Each is answered by one line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    """Open a folder, then answer until the input ends."""
    folder, dtype, length = sys.argv[1], sys.argv[2], int(sys.argv[3])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints is no answer
    import torch
    from vllm import LLM, SamplingParams, TokensPrompt

    # Of every group of tokens that is asked for, all are computed: no prefix is kept.
    engine = LLM(
        model=folder, dtype=dtype, enforce_eager=True, max_model_len=length, max_num_seqs=16,
        enable_prefix_caching=False, seed=0,
    )  # fmt: skip
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        asked = json.loads(line)
        sampling = SamplingParams(
            temperature=0, max_tokens=asked["tokens"], ignore_eos=True, detokenize=False
        )
        prompts = [TokensPrompt(prompt_token_ids=ids) for ids in asked["prompts"]]
        begun, cpu = time.perf_counter(), time.process_time()
        done = engine.generate(prompts, sampling, use_tqdm=False)
        seconds = {"wall": time.perf_counter() - begun, "cpu": time.process_time() - cpu}
        written = [list(one.outputs[0].token_ids) for one in done]
        answer: dict[str, Any] = {"seconds": seconds, "written": written}
        if asked["check"]:
            answer["gaps"] = _gaps(torch, folder, dtype, asked["prompts"], written)
        print(json.dumps(answer), file=answers)


def _gaps(
    torch: Any, folder: str, dtype: str, prompts: list[list[int]], written: list[list[int]]
) -> list[float]:
    """For each prompt, by how much transformers' best token is ahead of the one that vLLM wrote.

    The largest over the tokens, each after the same ones before it: 0 where all are the same.
    """
    import transformers

    import rankfold  # noqa: F401  (opens factorized folders)

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True
    ).eval()
    gaps: list[float] = []
    with torch.inference_mode():
        for prompt, tokens in zip(prompts, written, strict=True):
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
            chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            gaps.append(float((logits.max(1).values - chosen).max()))
    return gaps


if __name__ == "__main__":
    main()
