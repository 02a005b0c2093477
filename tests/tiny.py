"""Tiny random Hugging Face models, one call each: what the tests convert instead of a download.

Weights are random but not small, norm gains are spread and biases are not zero, so that a forgotten gain, a transposed
matrix or a wrong row order changes the logits by far more than any tolerance.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("t h", "Ġ t", "Ġt h", "th e", "Ġ a", "i n", "Ġ o", "Ġo n", "Ġon c", "Ġonc e", "e r", "Ġ w")
SMALLEST_TOKENIZER = 256 + len(MERGES) + len(SPECIAL_TOKENS)
SPLIT = (  # of Qwen2
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
GAIN_SPREAD = 0.4  # standard deviation of the logarithm of norm gains
BIAS_SPREAD = 0.5
LOGIT_SPREAD = 3.0  # the head is scaled so that some tokens are much likelier than others


def tiny_tokenizer(vocabulary: int) -> Tokenizer:
    """A byte-level BPE with twelve merges; ids up to `vocabulary` are filled with tokens no text makes."""
    assert vocabulary >= SMALLEST_TOKENIZER, f"a byte-level tokenizer needs {SMALLEST_TOKENIZER} tokens"
    words = sorted(pre_tokenizers.ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in MERGES]
    words += [f"unused{index}" for index in range(vocabulary - SMALLEST_TOKENIZER)]
    pairs = [(first, second) for first, second in (merge.split(" ") for merge in MERGES)]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return tokenizer


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    tiny_tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS[0],
        "pad_token": SPECIAL_TOKENS[0],
        "bos_token": None,
        "add_bos_token": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=1), encoding="utf-8")


def _model_class(family: str) -> tuple[Any, Any]:
    import transformers

    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    return getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")


def _randomize(model: torch.nn.Module, seed: int) -> None:
    """Matrices keep the scale of what they read; gains are lognormal, biases normal."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        if name.endswith("norm.weight"):
            values = torch.exp(GAIN_SPREAD * values)
        elif name.endswith(".bias"):
            values = BIAS_SPREAD * values
        elif "embed_tokens" not in name:
            values = values * (LOGIT_SPREAD if "lm_head" in name else 1.0) / parameter.shape[1] ** 0.5
        parameter.data.copy_(values)


def tiny_model(
    family: str,
    folder: Path,
    *,
    tied: bool = False,
    seed: int = 0,
    dtype: str = "float32",
    layers: int = 2,
    width: int = 64,
    hidden: int = 96,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    vocabulary: int = 288,
    context: int = 128,
    shard_size: str = "1GB",
    **more: Any,
) -> Path:
    """Write a random model of one of FAMILIES to `folder` (made if need be) and return it.

    qwen3 gets heads twice as wide as width / heads unless told. `more` goes to transformers' config
    (attention_bias=True, rope_parameters={...}). Below SMALLEST_TOKENIZER tokens no tokenizer is written.
    """
    config_class, model_class = _model_class(family)
    if head_dim is None:
        head_dim = width // heads * (2 if family == "qwen3" else 1)
    config = config_class(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=vocabulary - len(SPECIAL_TOKENS) if vocabulary >= SMALLEST_TOKENIZER else None,
        **({} if family == "qwen2" else {"head_dim": head_dim}),
        **more,
    )
    model = model_class(config).to(torch.float32)
    _randomize(model, seed)
    if tied:
        model.tie_weights()
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size)
    if vocabulary >= SMALLEST_TOKENIZER:
        _write_tokenizer(folder, vocabulary)
    return folder
