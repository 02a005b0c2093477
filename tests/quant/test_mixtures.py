"""llama.cpp's mixtures: formats by part and layer, fallbacks for rows that do not fit, overrides."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import pytest

from rondel.converters.checkpoint import open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.export import ExportConfig, export
from rondel.converters.metadata import file_type
from rondel.quant.fallbacks import fitting
from rondel.quant.mixtures import (
    MIXTURES,
    Choice,
    Model,
    Policy,
    choose_formats,
    format_named,
    is_matrix,
    mixture_named,
)
from rondel.quant.quantize import QuantizeConfig, plan
from tests.peer.quantizer import find_quantizer, llama_quantize
from tests.tiny import tiny_model

LAYERS = 16
ROLES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def shapes(cols: int = 256, tied: bool = False) -> dict[str, tuple[int, ...]]:
    listed: dict[str, tuple[int, ...]] = {"token_embd.weight": (64, cols)}
    for layer in range(LAYERS):
        listed[f"blk.{layer}.attn_norm.weight"] = (cols,)
        listed[f"blk.{layer}.attn_q.bias"] = (32,)
        listed |= {f"blk.{layer}.{role}.weight": (32, cols) for role in ROLES}
    listed["output_norm.weight"] = (cols,)
    return listed if tied else listed | {"output.weight": (64, cols)}


def model(*, gqa: int = 2, tied: bool = False, importance: bool = False, class_70b: bool = False) -> Model:
    return Model(LAYERS, LAYERS, gqa, tied, class_70b, importance)


def chosen(policy: Policy, facts: Model, cols: int = 256) -> dict[str, str]:
    return {name: choice.format for name, choice in choose_formats(shapes(cols, facts.tied), policy, facts).items()}


def layers_with(formats: dict[str, str], role: str, format: str) -> list[int]:
    return [layer for layer in range(LAYERS) if formats[f"blk.{layer}.{role}.weight"] == format]


MORE_BITS = [0, 1, 4, 7, 10, 13, 14, 15]  # of 16: the first and last eighth, and every third between
ALL = list(range(LAYERS))


@pytest.mark.parametrize(
    ("mixture", "role", "format", "layers"),
    [
        ("Q2_K", "attn_v", "Q3_K", ALL),
        ("Q2_K", "ffn_down", "Q3_K", ALL),
        ("Q2_K", "attn_output", "Q3_K", ALL),
        ("Q2_K", "ffn_up", "Q2_K", ALL),
        ("Q2_K_S", "ffn_down", "Q4_K", [0, 1]),
        ("Q3_K_S", "ffn_down", "Q3_K", ALL),
        ("Q3_K_M", "attn_v", "Q5_K", [0, 1]),
        ("Q3_K_M", "attn_v", "Q4_K", ALL[2:]),
        ("Q3_K_M", "ffn_down", "Q5_K", [0]),
        ("Q3_K_M", "ffn_down", "Q4_K", ALL[1:]),
        ("Q3_K_M", "attn_output", "Q4_K", ALL),
        ("Q3_K_L", "attn_v", "Q5_K", ALL),
        ("Q3_K_L", "ffn_down", "Q5_K", ALL),
        ("Q3_K_L", "attn_output", "Q5_K", ALL),
        ("Q4_K_S", "attn_v", "Q5_K", [0, 1, 2, 3]),
        ("Q4_K_S", "ffn_down", "Q5_K", [0, 1]),
        ("Q4_K_M", "attn_v", "Q6_K", MORE_BITS),
        ("Q4_K_M", "ffn_down", "Q6_K", MORE_BITS),
        ("Q4_K_M", "attn_output", "Q4_K", ALL),
        ("Q5_K_M", "attn_v", "Q6_K", MORE_BITS),
        ("Q5_K_S", "attn_v", "Q5_K", ALL),
        ("IQ4_NL", "ffn_down", "Q5_K", [0, 1]),
        ("IQ4_XS", "ffn_down", "Q5_K", [0, 1]),
        ("IQ3_M", "attn_v", "Q4_K", ALL),
        ("IQ3_M", "ffn_down", "Q4_K", [0, 1]),
        ("IQ3_M", "attn_output", "Q4_K", ALL),
        ("IQ3_S", "attn_v", "IQ3_S", ALL),
        ("IQ3_XS", "attn_q", "IQ3_XXS", ALL),
        ("IQ3_XS", "ffn_up", "IQ3_XXS", ALL[2:14]),
        ("IQ3_XXS", "attn_k", "IQ2_S", ALL),
        ("IQ3_XXS", "attn_v", "IQ3_S", ALL),
        ("IQ3_XXS", "attn_output", "IQ3_S", ALL),
        ("IQ3_XXS", "ffn_down", "Q4_K", [0, 1]),
        ("IQ3_XXS", "ffn_down", "Q3_K", ALL[2:]),
        ("IQ2_M", "attn_v", "IQ3_S", ALL),
        ("IQ2_M", "attn_output", "IQ3_S", ALL),
        ("IQ2_S", "ffn_down", "IQ3_S", [0, 1]),
        ("IQ2_XXS", "attn_v", "Q2_K", ALL),
        ("IQ2_XXS", "attn_output", "IQ2_XXS", ALL),
        ("IQ2_XS", "ffn_down", "Q2_K", [0, 1]),
        ("IQ1_M", "attn_output", "IQ2_XXS", ALL),
        ("IQ1_S", "ffn_down", "Q2_K", [0, 1]),
        ("Q4_0", "ffn_down", "Q4_0", ALL),
    ],
)
def test_rules_by_part_and_layer(mixture: str, role: str, format: str, layers: list[int]) -> None:
    assert layers_with(chosen(Policy(mixture), model()), role, format) == layers


def test_rules_that_ask_for_grouped_queries_statistics_or_size() -> None:
    assert layers_with(chosen(Policy("Q2_K"), model(gqa=4)), "attn_v", "Q4_K") == ALL
    assert layers_with(chosen(Policy("Q2_K_S"), model(gqa=8)), "attn_v", "Q4_K") == ALL
    assert layers_with(chosen(Policy("IQ4_NL"), model(gqa=4)), "attn_v", "Q5_K") == ALL
    assert layers_with(chosen(Policy("Q4_K_S"), model(class_70b=True)), "attn_v", "Q5_K") == ALL
    assert layers_with(chosen(Policy("IQ3_XXS"), model(gqa=4)), "attn_v", "Q4_K") == ALL
    assert layers_with(chosen(Policy("IQ2_XS"), model(gqa=4, class_70b=True)), "attn_v", "Q4_K") == ALL
    measured = model(importance=True)
    assert layers_with(chosen(Policy("IQ3_XXS"), measured), "ffn_down", "IQ3_XXS") == ALL
    assert layers_with(chosen(Policy("IQ4_XS"), measured), "ffn_down", "Q5_K") == []
    assert layers_with(chosen(Policy("IQ4_NL"), measured), "ffn_down", "Q5_K") == []
    assert layers_with(chosen(Policy("Q4_0"), measured), "ffn_down", "Q4_1") == [0, 1]
    assert layers_with(chosen(Policy("Q5_0"), measured), "ffn_down", "Q5_1") == [0, 1]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_head_and_embedding(mixture: str) -> None:
    formats = chosen(Policy(mixture), model())
    low = mixture.startswith(("IQ1", "IQ2")) or mixture == "IQ3_XXS"
    assert formats["output.weight"] == ("Q8_0" if mixture in ("Q8_0", "MXFP4_MOE") else "Q5_K" if low else "Q6_K")
    finer = {"IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S", "IQ3_XXS": "IQ3_S"}.get(mixture, "Q2_K")
    others = {"TQ1_0": "Q4_K", "TQ2_0": "Q4_K", "Q2_0": "Q4_K", "MXFP4_MOE": "Q8_0"}
    assert formats["token_embd.weight"] == (finer if low else others.get(mixture, MIXTURES[mixture]))
    tied = chosen(Policy(mixture), model(tied=True))
    assert tied["token_embd.weight"] == formats["output.weight"]


def test_norms_and_biases_are_left_alone() -> None:
    quantized = chosen(Policy("Q4_K_M"), model())
    assert len(quantized) == LAYERS * len(ROLES) + 2
    assert not is_matrix("blk.0.attn_q_norm.weight", (32, 64))
    assert not is_matrix("blk.0.attn_q.bias", (1, 64))


@pytest.mark.parametrize(
    ("format", "cols", "instead"),
    [
        ("Q2_K", 256, "Q2_K"),
        ("Q2_K", 96, "Q4_0"),
        ("Q3_K", 896, "Q4_0"),
        ("Q4_K", 64, "Q5_0"),
        ("Q5_K", 64, "Q5_1"),
        ("Q6_K", 64, "Q8_0"),
        ("Q6_K", 172, "F16"),
        ("Q8_0", 172, "F16"),
        ("IQ4_NL", 172, "F16"),
        ("IQ4_XS", 96, "IQ4_NL"),
        ("IQ2_XXS", 896, "IQ4_NL"),
        ("U4-256", 128, "U4-128"),
        ("U4-128", 192, "U4-64"),
        ("U4-64", 96, "Q4_0"),
        ("U8-128", 96, "Q8_0"),
        ("U2-128", 172, "F16"),
    ],
)
def test_fallbacks(format: str, cols: int, instead: str) -> None:
    assert fitting(format, cols) == instead


def test_head_of_rows_that_do_not_fit() -> None:
    narrow = choose_formats(shapes(64), Policy("Q4_K_M"), model())
    assert narrow["output.weight"] == Choice("Q8_0", "Q8_0")
    assert choose_formats(shapes(64), Policy("Q4_0"), model())["output.weight"] == Choice("Q8_0", "Q6_K")
    assert narrow["blk.0.ffn_up.weight"].fallback


def test_overrides_come_in_order_and_shift_the_count_of_layers() -> None:
    overrides = ((re.compile(r"blk\.0\.attn_v"), "Q8_0"), (re.compile("attn_v"), "Q2_K"))
    formats = chosen(Policy("Q4_K_M", overrides=overrides), model())
    assert formats["blk.0.attn_v.weight"] == "Q8_0"
    assert layers_with(formats, "attn_v", "Q2_K") == ALL[1:]
    first = chosen(Policy("Q4_K_S", overrides=overrides[:1]), model())  # llama.cpp counts those it decides itself
    assert layers_with(first, "attn_v", "Q5_K") == [1, 2, 3, 4]


def test_pure_and_the_types_of_embedding_and_head() -> None:
    assert set(chosen(Policy("Q4_K_M", pure=True), model()).values()) == {"Q4_K"}
    formats = chosen(Policy("Q2_K", embedding="Q8_0", output="Q5_K"), model())
    assert (formats["token_embd.weight"], formats["output.weight"]) == ("Q8_0", "Q5_K")


def test_tile_formats_keep_embedding_and_head_finer() -> None:
    formats = chosen(Policy("U4-128"), model())
    assert (formats.pop("token_embd.weight"), formats.pop("output.weight")) == ("Q6_K", "Q6_K")
    assert set(formats.values()) == {"U4-128"}
    assert set(chosen(Policy("U8-64", pure=True), model()).values()) == {"U8-64"}


def test_names() -> None:
    assert [mixture_named(name) for name in ("q4_k", "Q3_K", "U4", "u8-256")] == [
        "Q4_K_M",
        "Q3_K_M",
        "U4-128",
        "U8-256",
    ]
    assert [format_named(name) for name in ("q4_k", "u4", "f16")] == ["Q4_K", "U4-128", "F16"]
    for name in ("Q7_K", "F16", ""):
        with pytest.raises(RondelError, match="Q4_K_M"):
            mixture_named(name)
    with pytest.raises(RondelError, match="IQ4_NL"):
        format_named("Q4_K_M")


# Sixteen layers with grouped queries; the same ungrouped, where a rule asks; rows of 64 and 172 and a tied head.
BIG = {"width": 256, "hidden": 256, "heads": 4, "layers": 16}
PEER_MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "grouped": (BIG | {"kv_heads": 1}, tuple(MIXTURES)),
    "ungrouped": (BIG | {"kv_heads": 4}, ("Q2_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_M")),
    "narrow": ({"width": 64, "hidden": 172, "layers": 8, "tied": True}, tuple(MIXTURES)),
}
# llama.cpp refuses these without one
UNKNOWN_TO_GGUF = ("MXFP4", "Q2_0", "Q1_0")  # no mixture of llama-quantize's; not read, or not for all rows
NEEDS_AN_IMATRIX = ("Q2_K_S", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS")


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.skipif(find_quantizer() is None, reason="needs llama-quantize's function: pip install llama-cpp-python")
@pytest.mark.parametrize("shape", PEER_MODELS)
def test_llama_quantize_chooses_the_same_formats(shape: str, tmp_path: Path) -> None:
    sizes, mixtures = PEER_MODELS[shape]
    source = open_checkpoint(tiny_model("llama", tmp_path / "hf", **sizes))
    (exported,) = export(source, tmp_path / "f16.gguf", ExportConfig(type="F16"))
    for mixture in mixtures:
        if mixture in NEEDS_AN_IMATRIX or mixture in UNKNOWN_TO_GGUF:
            continue
        number = file_type(mixture)
        assert number is not None
        theirs = tmp_path / "theirs.gguf"
        llama_quantize(exported, theirs, number)
        types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(theirs).tensors}
        ours = {line["name"]: line["format"] for line in plan(source, QuantizeConfig(mixture))["tensors"]}
        assert {name: types[name] for name in ours} == ours, mixture
