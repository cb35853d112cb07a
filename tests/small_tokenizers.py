"""Tokenizers of thirty families of transformers, each with its own class and a small vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import transformers as tf

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ("the", "film", "was", "good", "bad")
BART = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
MERGES = [("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e")]


def _numbered(names: Sequence[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def _pieces() -> dict[str, int]:
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<cls>", "<sep>", "<pad>", "<unk>")
    more = ("<mask>", "<s>", "</s>")
    return _numbered([*special, *more, *LETTERS, *(f"##{c}" for c in LETTERS), *WORDS, "."])


def _bytes(*special: str) -> dict[str, Any]:
    names = [*special, "Ġ", *LETTERS, "Ġt", "Ġth", "Ġthe", ".", "L"]
    return {"vocab": _numbered(names), "merges": MERGES}


def _unigrams(*special: str) -> dict[str, Any]:
    names = _numbered([*special, "▁", *LETTERS, *(f"▁{word}" for word in WORDS), ".", "L"])
    scores = {n: 0.0 if n in special else -6.0 / len(n) for n in names}
    return {"vocab": list(scores.items())}


def _characters(*special: str) -> dict[str, Any]:
    return {"vocab": _numbered([*special, "▁", *LETTERS, "."]), "merges": []}


def _word_ends() -> dict[str, int]:
    ends = (f"{letter}</w>" for letter in (*LETTERS, "."))
    return _numbered([*LETTERS, ".", *ends, "<|startoftext|>", "<|endoftext|>"])


# Three of these have a side for targets that writes other language codes.
FAMILIES: dict[str, Callable[[], Any]] = {
    "bert": lambda: tf.BertTokenizer(vocab=_pieces()),
    "electra": lambda: tf.ElectraTokenizer(vocab=_pieces()),
    "funnel": lambda: tf.FunnelTokenizer(vocab=_pieces()),
    "mpnet": lambda: tf.MPNetTokenizer(vocab=_pieces()),
    "roberta": lambda: tf.RobertaTokenizer(**_bytes(*BART), add_prefix_space=True),
    "bart": lambda: tf.BartTokenizer(**_bytes(*BART), add_prefix_space=True),
    "blenderbot": lambda: tf.BlenderbotTokenizer(**_bytes(*BART)),
    "gpt2": lambda: tf.GPT2Tokenizer(**_bytes("<|endoftext|>"), add_prefix_space=True),
    "whisper": lambda: tf.WhisperTokenizer(
        **_bytes("<|endoftext|>"), language="english", task="transcribe"
    ),
    "t5": lambda: tf.T5Tokenizer(**_unigrams("<pad>", "</s>", "<unk>"), extra_ids=2),
    "pegasus": lambda: tf.PegasusTokenizer(
        **_unigrams("<pad>", "</s>", "<mask_1>", "<mask_2>", "<unk>")
    ),
    "xlnet": lambda: tf.XLNetTokenizer(
        **_unigrams("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>")
    ),
    "albert": lambda: tf.AlbertTokenizer(**_unigrams("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")),
    "deberta": lambda: tf.DebertaV2Tokenizer(
        **_unigrams("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
    ),
    "camembert": lambda: tf.CamembertTokenizer(**_unigrams(*BART)),
    "mbart": lambda: tf.MBartTokenizer(**_unigrams(*BART[:4]), src_lang="en_XX", tgt_lang="ro_RO"),
    "mbart50": lambda: tf.MBart50Tokenizer(
        **_unigrams(*BART[:4]), src_lang="en_XX", tgt_lang="ro_RO"
    ),
    "nllb": lambda: tf.NllbTokenizer(
        **_characters(*BART[:4]), src_lang="eng_Latn", tgt_lang="ron_Latn"
    ),
    "llama": lambda: tf.LlamaTokenizer(**_characters("<unk>", "<s>", "</s>")),
    "llama with padding": lambda: tf.LlamaTokenizer(
        **_characters("<unk>", "<s>", "</s>", "<pad>"), pad_token="<pad>"
    ),
    "distilbert": lambda: tf.DistilBertTokenizer(vocab=_pieces()),
    "xlm-roberta": lambda: tf.XLMRobertaTokenizer(**_unigrams(*BART)),
    "bigbird": lambda: tf.BigBirdTokenizer(
        **_unigrams("<pad>", "</s>", "<s>", "<unk>", "[MASK]", "[CLS]", "[SEP]")
    ),
    "fnet": lambda: tf.FNetTokenizer(**_unigrams("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")),
    "qwen2": lambda: tf.Qwen2Tokenizer(**_bytes("<|endoftext|>")),
    "gemma": lambda: tf.GemmaTokenizer(**_characters("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")),
    "gpt-neox": lambda: tf.GPTNeoXTokenizer(**_bytes("<|endoftext|>", "<|padding|>")),
    "clip": lambda: tf.CLIPTokenizer(vocab=_word_ends(), merges=[]),
}
# It doesn't say which word a token belongs to.
SLOW: dict[str, Callable[[], Any]] = {"byt5": lambda: tf.ByT5Tokenizer(extra_ids=0)}
TWO_SIDED = ("mbart", "mbart50", "nllb")
