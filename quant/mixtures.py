"""Which format every tensor gets: llama.cpp's named mixtures, its fallbacks for rows that do not fit, and overrides.

A mixture such as Q4_K_M is a default format and rules by the part that a tensor plays and by its layer. The rules are
llama.cpp's own, so that a file called Q4_K_M spends its bytes where everybody expects them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rondel.converters.errors import RondelError
from rondel.converters.family import EMBEDDING, OUTPUT, Family
from rondel.converters.hyperparameters import Hyperparameters
from rondel.native.formats import formats
from rondel.quant.fallbacks import TERNARY, fitting, is_tile

# The default format of every mixture by the name that llama.cpp gives it.
MIXTURES = {
    "Q2_K": "Q2_K",
    "Q2_K_S": "Q2_K",
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_L": "Q3_K",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K",
    "Q8_0": "Q8_0",
    "Q4_0": "Q4_0",
    "Q4_1": "Q4_1",
    "Q5_0": "Q5_0",
    "Q5_1": "Q5_1",
    "IQ4_NL": "IQ4_NL",
    "IQ4_XS": "IQ4_XS",
    "IQ3_M": "IQ3_S",
    "IQ3_S": "IQ3_S",
    "IQ3_XS": "IQ3_S",
    "IQ3_XXS": "IQ3_XXS",
    "IQ2_M": "IQ2_S",
    "IQ2_S": "IQ2_XS",
    "IQ2_XS": "IQ2_XS",
    "IQ2_XXS": "IQ2_XXS",
    "IQ1_M": "IQ1_M",
    "IQ1_S": "IQ1_S",
    "TQ2_0": "TQ2_0",
    "TQ1_0": "TQ1_0",
    "Q2_0": "Q2_0",
    "Q1_0": "Q1_0",
    "MXFP4": "MXFP4",
    "MXFP4_MOE": "MXFP4",
}
# The mixtures of one and two bits have rules of their own; those in UPPER_TWO keep IQ3_S where the others keep Q2_K.
ONE_BIT = ("IQ1_S", "IQ1_M")
UPPER_TWO = ("IQ2_S", "IQ2_M")
LOW = (*ONE_BIT, "IQ2_XXS", "IQ2_XS", *UPPER_TWO)
MIXTURE_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
TILE_ALIASES = {"U2": "U2-128", "U4": "U4-128", "U8": "U8-128"}
TILE_ENDS = {"U2": "Q6_K", "U4": "Q6_K", "U8": "Q8_0"}  # embedding and head beside tile formats


def format_named(name: str) -> str:
    """The canonical spelling of one format ("q4_k" is Q4_K, "U4" is U4-128); refuses an unknown one."""
    upper = name.upper()
    upper = TILE_ALIASES.get(upper, upper)
    encodable = [format.name for format in formats().values() if format.encodes]
    if upper not in encodable:
        raise RondelError(f"there is no format {name!r} to quantize to; expected one of {', '.join(encodable)}")
    return upper


def mixture_named(name: str) -> str:
    """The canonical spelling of what to quantize to: a mixture, or a tile format; refuses anything else."""
    upper = name.upper()
    upper = MIXTURE_ALIASES.get(upper, TILE_ALIASES.get(upper, upper))
    if upper not in MIXTURES and not is_tile(upper):
        tiles = ", ".join(format for format in formats() if is_tile(format))
        raise RondelError(f"there is no type {name!r} to quantize to; expected one of {', '.join(MIXTURES)}, {tiles}")
    return upper


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is quantized at all: matrices of weights are, norms, biases and RoPE factors are not."""
    return len(shape) == 2 and name.endswith("weight") and "_norm.weight" not in name


def uses_more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


@dataclass(frozen=True)
class Model:
    """What the rules ask about a model."""

    layers: int
    values: int  # tensors called attn_v
    gqa: int  # heads per key-value head
    tied: bool
    class_70b: bool  # llama.cpp counts it to its 70B class: 80 layers with few key-value heads
    importance: bool  # statistics weigh the errors


def model_of(family: Family, numbers: Hyperparameters, names: Iterable[str], importance: bool) -> Model:
    """The facts of a checkpoint whose tensors are `names`."""
    listed = set(names)
    gqa = numbers.heads // numbers.kv_heads
    return Model(
        layers=numbers.layers,
        values=sum("attn_v.weight" in name for name in listed),
        gqa=gqa,
        tied=OUTPUT not in listed,
        class_70b=numbers.layers == 80 and (family.name == "qwen2" or (family.name == "llama" and gqa > 1)),
        importance=importance,
    )


def _head(mixture: str, cols: int) -> str:
    default = MIXTURES[mixture]
    if cols % formats()[default].block or default == "Q8_0":
        return "Q8_0"
    return "Q5_K" if mixture in (*LOW, "IQ3_XXS") else "Q6_K"


def _embedding(mixture: str) -> str:
    """The embedding, where it is not the head as well."""
    if mixture in (*UPPER_TWO, "IQ3_XXS"):
        return "IQ3_S"
    if mixture in TERNARY:
        return "Q4_K"
    return "Q2_K" if mixture in LOW else MIXTURES[mixture]


def _values(mixture: str, model: Model, seen: int) -> str:
    """attn_v: small under grouped queries and read by every token, so it gets more than the default."""
    default = chosen = MIXTURES[mixture]
    grouped = model.gqa >= 4
    if mixture in LOW:
        return "Q4_K" if grouped else "IQ3_S" if mixture in UPPER_TWO else "Q2_K"
    if mixture == "Q2_K":
        chosen = "Q4_K" if grouped else "Q3_K"
    elif mixture == "IQ3_M" or (mixture in ("Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S") and grouped):
        chosen = "Q4_K"
    elif mixture == "IQ3_XXS" and not model.importance:
        chosen = "IQ3_S"
    elif mixture == "Q3_K_M":
        chosen = "Q5_K" if seen < 2 else "Q4_K"
    elif mixture == "Q3_K_L" or (mixture in ("IQ4_NL", "IQ4_XS") and grouped) or (mixture == "Q4_K_S" and seen < 4):
        chosen = "Q5_K"
    elif mixture in ("Q4_K_M", "Q5_K_M") and uses_more_bits(seen, model.values):
        chosen = "Q6_K"
    if model.class_70b and chosen in ("Q3_K", "Q4_K"):
        chosen = "Q5_K"
    return chosen or default


def _down(mixture: str, model: Model, seen: int) -> str:
    """ffn_down: reads the widest and most uneven activations."""
    default = MIXTURES[mixture]
    early = seen < model.layers // 8
    everywhere = {"Q2_K": "Q3_K", "Q3_K_L": "Q5_K"}
    if mixture in everywhere:
        return everywhere[mixture]
    if mixture == "Q3_K_M":
        return "Q5_K" if seen < model.layers // 16 else "Q4_K"
    if mixture in ("Q4_K_M", "Q5_K_M") and uses_more_bits(seen, model.layers):
        return "Q6_K"
    if mixture == "IQ3_XXS" and not model.importance:
        return "Q4_K" if early else "Q3_K"
    if not early:
        return default
    always = {"Q2_K_S": "Q4_K", "Q4_K_S": "Q5_K", "IQ3_M": "Q4_K"}
    always |= dict.fromkeys(LOW, "Q2_K") | dict.fromkeys(UPPER_TWO, "IQ3_S")
    with_importance = always | {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}
    without = always | {"IQ4_NL": "Q5_K", "IQ4_XS": "Q5_K"}
    return (with_importance if model.importance else without).get(mixture, default)


def _attention_output(mixture: str) -> str:
    chosen = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_XXS": "IQ3_S", "IQ3_M": "Q4_K"}
    chosen |= dict.fromkeys(ONE_BIT, "IQ2_XXS") | dict.fromkeys(UPPER_TWO, "IQ3_S")
    return chosen.get(mixture, MIXTURES[mixture])


def _queries_and_keys(mixture: str) -> str:
    return {"IQ3_XXS": "IQ2_S", "IQ3_XS": "IQ3_XXS"}.get(mixture, MIXTURES[mixture])


def _gate_or_up(mixture: str, model: Model, seen: int) -> str:
    """IQ3_XS saves on the middle layers."""
    middle = model.layers // 8 <= seen < 7 * model.layers // 8
    return "IQ3_XXS" if mixture == "IQ3_XS" and middle else MIXTURES[mixture]


@dataclass(frozen=True)
class Choice:
    """The format of one tensor, and the one it would have had if its rows fitted."""

    format: str
    wanted: str

    @property
    def fallback(self) -> bool:
        """Whether another format stands in."""
        return self.format != self.wanted


@dataclass(frozen=True)
class Policy:
    """What the user asked for. Overrides are (regular expression, format); the first that is found in a name wins."""

    mixture: str
    pure: bool = False
    overrides: tuple[tuple[re.Pattern[str], str], ...] = ()
    embedding: str | None = None
    output: str | None = None


# What the rules tell apart, by a piece of the name.
PARTS = ("attn_v.weight", "ffn_down", "attn_output.weight", "attn_q.weight", "attn_k.weight", "ffn_gate", "ffn_up")


def _by_part(part: str, mixture: str, model: Model, seen: int) -> str:
    if part == "attn_v.weight":
        return _values(mixture, model, seen)
    if part == "ffn_down":
        return _down(mixture, model, seen)
    if part == "attn_output.weight":
        return _attention_output(mixture)
    return _queries_and_keys(mixture) if part.startswith("attn") else _gate_or_up(mixture, model, seen)


def _by_rule(name: str, cols: int, policy: Policy, model: Model, seen: dict[str, int]) -> str:
    """The mixture's own choice. `seen` counts the tensors of a part that the rules decided so far."""
    mixture = policy.mixture
    if mixture == "MXFP4_MOE":  # MXFP4 is for experts; everything else is kept at eight bits
        return MIXTURES[mixture] if "_exps" in name else "Q8_0"
    head = name == OUTPUT or (model.tied and name == EMBEDDING)
    if is_tile(mixture):
        return policy.output or TILE_ENDS[mixture.partition("-")[0]] if head or name == EMBEDDING else mixture
    if head:
        return policy.output or _head(mixture, cols)
    if name == EMBEDDING:
        return _embedding(mixture)
    part = next((part for part in PARTS if part in name), None)
    if part is None:
        return MIXTURES[mixture]
    position = seen.get(part, 0)
    seen[part] = position + 1
    return _by_part(part, mixture, model, position)


def forced_format(name: str, policy: Policy) -> str | None:
    """The format that the user's overrides give a tensor, if any."""
    if name == EMBEDDING and policy.embedding:
        return policy.embedding
    if name == OUTPUT and policy.output:
        return policy.output
    return next((format for pattern, format in policy.overrides if pattern.search(name)), None)


def choose_formats(shapes: Mapping[str, tuple[int, ...]], policy: Policy, model: Model) -> dict[str, Choice]:
    """The format of every matrix in `shapes` (canonical names in the order of the layers)."""
    choices = {}
    seen: dict[str, int] = {}
    for name, shape in shapes.items():
        if not is_matrix(name, shape):
            continue
        forced = forced_format(name, policy)
        if forced:
            wanted = forced
        elif policy.pure:
            wanted = MIXTURES.get(policy.mixture, policy.mixture)
        else:
            wanted = _by_rule(name, shape[1], policy, model, seen)
        choices[name] = Choice(fitting(wanted, shape[1]), wanted)
    return choices
