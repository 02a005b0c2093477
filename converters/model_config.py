"""config.json to Hyperparameters: reads what transformers 4 and 5 write, and names what rondel does not compute."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rondel.converters.config_fields import ConfigFields
from rondel.converters.errors import RondelError
from rondel.converters.families import FAMILIES
from rondel.converters.family import Family
from rondel.converters.hyperparameters import Hyperparameters
from rondel.converters.sparse_config import experts_of, latents_of

CONFIG = "config.json"
LARGEST_CONTEXT = 1 << 31  # tokens
ROPE_TYPES = ("default", "linear", "llama3")
STRETCHED = ("yarn",)  # what no forward pass of rondel computes; a change of basis need not know
ROPE_FIELDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def read_config(root: Path) -> dict[str, Any]:
    """The dictionary of a folder's config.json."""
    path = root / CONFIG
    if not path.is_file():
        raise RondelError(f"{root}: has no {CONFIG}; a model is a Hugging Face folder or the output of a rondel stage")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise RondelError(f"{path}: is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise RondelError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def family_of(config: dict[str, Any], path: Path) -> Family:
    """The family whose table lists this config's architecture."""
    named = config.get("architectures") or [None]
    for family in FAMILIES.values():
        if isinstance(named, list) and named[0] in family.architectures:
            return family
    known = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
    raise RondelError(f"{path}: the architecture {named!r} is not supported; rondel knows {known}")


def _rope(config: ConfigFields, kinds: tuple[str, ...]) -> tuple[float, dict[str, Any] | None]:
    """The base and the scaling of RoPE; the scaling is None where positions are used as they are."""
    fields = config.fields
    found = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
        raise config.refuse("rope_parameters", "one flat object for all layers", found)
    base = config.number("rope_theta", found.get("rope_theta", fields.get("rope_theta", 10000.0)))
    partial = found.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise config.refuse("partial_rotary_factor", "1 (RoPE over the whole head)", partial)
    kind = found.get("rope_type", found.get("type")) or "default"
    if kind not in kinds:
        raise config.refuse("the type of rope_scaling", f"one of {', '.join(kinds)}", kind)
    if kind == "default":
        return base, None
    if kind in STRETCHED:
        return base, {name: value for name, value in found.items() if isinstance(value, str | int | float | bool)}
    scaling: dict[str, Any] = {"rope_type": kind}
    for name in ROPE_FIELDS[kind]:
        value = found.get(name, fields.get(name))
        scaling[name] = config.number(f"{name} of rope_scaling {kind}", value)
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise config.refuse(
            "low_freq_factor of rope_scaling llama3", "below high_freq_factor", scaling["low_freq_factor"]
        )
    return base, scaling


def _refuse_what_is_not_computed(config: ConfigFields) -> None:
    fields = config.fields
    if fields.get("hidden_act", "silu") not in ("silu", "swish"):
        raise config.refuse("hidden_act", "silu", fields["hidden_act"])
    if config.flag("mlp_bias"):
        raise config.refuse("mlp_bias", "false (no biases in the feed-forward part)", True)
    if fields.get("quantization_config") is not None:
        method = fields["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise config.refuse("quantization_config", "absent (rondel starts from F32, F16 or BF16 weights)", method)


def hyperparameters(fields: dict[str, Any], path: Path, family: Family) -> Hyperparameters:
    """The numbers of a config.json; everything that the forward pass of rondel would compute otherwise is refused.

    A sliding window is ignored as llama.cpp ignores it for these families: every token attends to all before it.
    """
    config = ConfigFields(fields, path)
    _refuse_what_is_not_computed(config)
    width, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.refuse("num_attention_heads", f"a multiple of num_key_value_heads ({kv_heads})", heads)
    latents = latents_of(config) if family.latents else None
    if latents is None and fields.get("head_dim") is None and width % heads:
        raise config.refuse("hidden_size", f"a multiple of num_attention_heads ({heads}) without head_dim", width)
    head_dim = latents.nope + latents.rope if latents else config.size("head_dim", width // heads)
    if (latents.rope if latents else head_dim) % 2:
        raise config.refuse("qk_rope_head_dim" if latents else "head_dim", "even (RoPE turns pairs)", head_dim)
    base, scaling = _rope(config, ROPE_TYPES if family.runs else ROPE_TYPES + STRETCHED)
    return Hyperparameters(
        vocabulary=config.size("vocab_size"),
        context=config.size("max_position_embeddings", limit=LARGEST_CONTEXT),
        width=width,
        layers=config.size("num_hidden_layers"),
        hidden=config.size("intermediate_size"),
        heads=heads,
        kv_heads=heads if latents else kv_heads,
        head_dim=head_dim,
        norm_epsilon=config.number("rms_norm_eps", fields.get("rms_norm_eps", 1e-6)),
        rope_base=base,
        tied=config.flag("tie_word_embeddings"),
        rope_scaling=scaling,
        experts=experts_of(config) if family.experts else None,
        latents=latents,
    )
