"""Small models of families of transformers, in folders beside their own tokenizer or processor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers as tf

from tests.small_models import seeded
from tests.small_tokenizers import FAMILIES, SLOW

WIDE: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 96, "initializer_range": 0.5,
}  # fmt: skip
GROUPED: dict[str, Any] = {**WIDE, "num_key_value_heads": 2}
BART: dict[str, Any] = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "init_std": 0.5,
    "max_position_embeddings": 96, "forced_eos_token_id": None,
}  # fmt: skip
T5: dict[str, Any] = {
    "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2,
    "initializer_factor": 3.0, "decoder_start_token_id": 0,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}a {% generation %}{{ m.content }}."
    "{% endgeneration %}{% else %}u {{ m.content }}.{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}a {% endif %}"
)
CLASSES = ("ant", "cow", "fox")
NAMES: dict[str, Any] = {
    "id2label": dict(enumerate(CLASSES)), "label2id": {n: i for i, n in enumerate(CLASSES)}
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A family of models that read text.

    Attributes:
        prefix: Of its classes in transformers.
        options: Of its configuration.
        tokenizer: Which of ``small_tokenizers``.
        tasks: What it is tried for: the end of the class's name and the kind of data.
    """

    prefix: str
    options: dict[str, Any]
    tokenizer: str
    tasks: tuple[tuple[str, str], ...]


SORTS, TAGS = ("ForSequenceClassification", "classes"), ("ForTokenClassification", "tags")
HIDES, EMBEDS = ("ForMaskedLM", "hidden"), ("Model", "embeddings")
ENCODER = (SORTS, TAGS, HIDES, EMBEDS)
WRITES = (("ForCausalLM", "windows"), ("ForCausalLM", "texts"), ("ForCausalLM", "chats"), SORTS)
ANSWERS = (("ForConditionalGeneration", "targets"),)

TEXT: dict[str, Family] = {
    "bert": Family("Bert", WIDE, "bert", ENCODER),
    "roberta": Family("Roberta", WIDE, "roberta", ENCODER),
    "electra": Family("Electra", WIDE, "electra", (SORTS, HIDES)),
    "albert": Family("Albert", {**WIDE, "embedding_size": 8}, "albert", ENCODER),
    "deberta": Family("DebertaV2", WIDE, "deberta", ENCODER),
    "mpnet": Family("MPNet", WIDE, "mpnet", (SORTS, EMBEDS)),
    "distilbert": Family(
        "DistilBert", {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2}, "distilbert",
        (SORTS, TAGS),
    ),
    "xlm-roberta": Family("XLMRoberta", WIDE, "xlm-roberta", (SORTS, HIDES)),
    "camembert": Family("Camembert", WIDE, "camembert", (TAGS,)),
    "bigbird": Family(
        "BigBird", {**WIDE, "attention_type": "original_full"}, "bigbird", (SORTS, TAGS)
    ),
    "fnet": Family("FNet", WIDE, "fnet", (SORTS, HIDES)),
    "funnel": Family(
        "Funnel",
        {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 16, "n_head": 2, "d_head": 8,
         "d_inner": 24},
        "funnel", (SORTS, TAGS),
    ),
    "xlnet": Family(
        "XLNet", {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}, "xlnet",
        (SORTS, TAGS, EMBEDS),
    ),
    "clip-text": Family("CLIPText", WIDE, "clip", (EMBEDS,)),
    "gpt2": Family(
        "GPT2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 96}, "gpt2",
        (("LMHeadModel", "windows"), ("LMHeadModel", "texts"), ("LMHeadModel", "chats"), SORTS),
    ),
    "llama": Family("Llama", WIDE, "llama", WRITES),
    "mistral": Family("Mistral", GROUPED, "llama with padding", WRITES),
    "gemma": Family("Gemma", {**GROUPED, "head_dim": 8}, "gemma", WRITES),
    "qwen2": Family("Qwen2", GROUPED, "qwen2", WRITES),
    "gpt-neox": Family("GPTNeoX", WIDE, "gpt-neox", WRITES),
    "t5": Family("T5", T5, "t5", ANSWERS),
    "byt5": Family("T5", {**T5, "vocab_size": 384}, "byt5", ANSWERS),
    "bart": Family("Bart", BART, "bart", ANSWERS),
    "mbart": Family("MBart", BART, "mbart", ANSWERS),
    "mbart50": Family("MBart", BART, "mbart50", ANSWERS),
    "nllb": Family("M2M100", BART, "nllb", ANSWERS),
    "pegasus": Family("Pegasus", BART, "pegasus", ANSWERS),
    "blenderbot": Family("Blenderbot", BART, "blenderbot", ANSWERS),
}  # fmt: skip


def save_text_model(folder: Path, family: Family, ending: str) -> Path:
    """A folder with a model, its tokenizer, and a chat template that marks the answers."""
    tokenizer = {**FAMILIES, **SLOW}[family.tokenizer]()
    tokenizer.chat_template = TEMPLATE
    special = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")
    }
    options = {"vocab_size": len(tokenizer), **special, **NAMES, **family.options}
    config = getattr(tf, f"{family.prefix}Config")(**options)
    seeded(0, lambda: getattr(tf, f"{family.prefix}{ending}")(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SIZE = {"height": 16, "width": 16}
VIT: dict[str, Any] = {
    "image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 1, "num_attention_heads": 2, "initializer_range": 0.5,
}  # fmt: skip
STAGES: dict[str, Any] = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
BART_SOUND = {**BART, "num_mel_bins": 8, "max_source_positions": 50, "classifier_proj_size": 8}
WAVES: dict[str, Any] = {
    "vocab_size": 8, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
}  # fmt: skip


def _clip_processor() -> Any:
    images = tf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SIZE)
    return tf.CLIPProcessor(images, FAMILIES["clip"]())


def _whisper_processor() -> Any:
    sounds = tf.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    return tf.WhisperProcessor(sounds, FAMILIES["whisper"]())


def _wav2vec2_processor() -> Any:
    return tf.Wav2Vec2FeatureExtractor(sampling_rate=8000, return_attention_mask=True)


# The model's class, its configuration, and what prepares its inputs.
IMAGES: dict[str, tuple[str, Any, Callable[[], Any]]] = {
    "vit": ("ViTForImageClassification", VIT, lambda: tf.ViTImageProcessor(size=SIZE)),
    "deit": (
        "DeiTForImageClassification", VIT, lambda: tf.DeiTImageProcessor(size=SIZE, crop_size=SIZE)
    ),
    "beit": (
        "BeitForImageClassification", VIT, lambda: tf.BeitImageProcessor(size=SIZE, crop_size=SIZE)
    ),
    "convnext": (
        "ConvNextForImageClassification", STAGES,
        lambda: tf.ConvNextImageProcessor(size={"shortest_edge": 32}),
    ),
    "resnet": (
        "ResNetForImageClassification", {**STAGES, "embedding_size": 8},
        lambda: tf.ConvNextImageProcessor(size={"shortest_edge": 32}),
    ),
    "swin": (
        "SwinForImageClassification",
        {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2],
         "window_size": 2},
        lambda: tf.ViTImageProcessor(size=SIZE),
    ),
    "siglip": (
        "SiglipForImageClassification", {"vision_config": VIT},
        lambda: tf.SiglipImageProcessor(size=SIZE),
    ),
    "clip": ("CLIPForImageClassification", {"vision_config": VIT}, _clip_processor),
    "clip-vision": ("CLIPVisionModel", VIT, _clip_processor),
    "dinov2": (
        "Dinov2ForImageClassification", VIT,
        lambda: tf.BitImageProcessor(size={"shortest_edge": 16}, crop_size=SIZE),
    ),
}  # fmt: skip
SOUNDS: dict[str, tuple[str, Any, Callable[[], Any]]] = {
    "wav2vec2": ("Wav2Vec2ForSequenceClassification", WAVES, _wav2vec2_processor),
    "hubert": (
        "HubertForSequenceClassification", WAVES,
        lambda: tf.Wav2Vec2FeatureExtractor(sampling_rate=8000),
    ),
    "whisper": ("WhisperForAudioClassification", BART_SOUND, _whisper_processor),
    "ast": (
        "ASTForAudioClassification",
        {**VIT, "num_mel_bins": 16, "max_length": 32, "patch_size": 8},
        lambda: tf.ASTFeatureExtractor(sampling_rate=8000, num_mel_bins=16, max_length=32),
    ),
}  # fmt: skip


def save_other_model(folder: Path, made: tuple[str, Any, Callable[[], Any]]) -> Path:
    """A folder with a model of images or sounds, and its processor."""
    name, options, processor = made
    model = getattr(tf, name)
    config = model.config_class(**options, **NAMES)
    seeded(0, lambda: model(config)).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder
