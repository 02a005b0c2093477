"""A GGUF model of a few kilobytes, written with the gguf package alone: what run and eval are tested on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

WIDTH, HIDDEN, HEADS, LAYERS, TRAINED = 32, 64, 2, 2, 256
MARKS = ("<|start|>", "<|end|>")
WORDS = ("th", "the", "Ġth", "Ġthe", "in", "er", "on")
MERGES = ("t h", "Ġ th", "th e", "Ġth e", "i n", "e r", "o n")
TEMPLATE = "{% for m in messages %}<|start|>{{ m.role }}: {{ m.content }}\n{% endfor %}<|start|>assistant:"


def alphabet() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) for byte in shown] + [chr(256 + number) for number in range(len(hidden))]


TOKENS = [*alphabet(), *WORDS, *MARKS]
START, END = len(TOKENS) - 2, len(TOKENS) - 1


def write_model(path: Path, seed: int = 0, tokens: Sequence[str] = TOKENS, **keys: Any) -> Path:
    """A random F32 Llama. `keys`: tokenizer keys in place of the usual ones, None to leave one out."""
    generator = np.random.default_rng(seed)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(TRAINED)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    usual: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": [3 if token in MARKS else 1 for token in tokens],
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": START,
        "tokenizer.ggml.eos_token_id": END,
        "tokenizer.chat_template": TEMPLATE,
    }
    for name, value in (usual | keys).items():
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif value is not None:
            writer.add_array(name, value)

    def matrix(name: str, rows: int, cols: int) -> None:
        writer.add_tensor(name, (generator.normal(size=(rows, cols)) / cols**0.5).astype(np.float32))

    matrix("token_embd.weight", len(tokens), WIDTH)
    for layer in range(LAYERS):
        for name, rows, cols in (
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", WIDTH // HEADS, WIDTH),
            ("attn_v", WIDTH // HEADS, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_gate", HIDDEN, WIDTH),
            ("ffn_up", HIDDEN, WIDTH),
            ("ffn_down", WIDTH, HIDDEN),
        ):
            matrix(f"blk.{layer}.{name}.weight", rows, cols)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(WIDTH, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    matrix("output.weight", len(tokens), WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
