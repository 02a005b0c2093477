"""What a model family is: the linears with the sites they read and write, the norms, and the facts stages ask for.

Sites are places where activations stand:

    residual -> [attn_norm] -> attn_in -> q, k, v -> heads -> attn_output -> residual
    residual -> [ffn_norm]  -> ffn_in  -> gate, up -> hidden -> down -> residual
    residual -> [output_norm] -> output_in -> output

Latent attention puts low-rank latents, each in front of a norm, between the stream and the heads; a mixture of experts
has a hidden site for the routed experts and one for the shared expert, and a router that reads what they read:

    attn_in -> q_a  -> q_latent  -> [q_a_norm]  -> q_latent_in  -> q_b  -> nope, queries (RoPE) of every head
    attn_in -> kv_a -> kv_latent -> [kv_a_norm] -> kv_latent_in -> kv_b -> nope, values of every head
                    -> keys (RoPE, no norm), which all heads share
    ffn_in  -> router -> routes;  -> gate, up of each expert -> hidden_experts, hidden_shared -> down -> residual

Canonical names are GGUF's (`blk.3.attn_q.weight`), and so is the order of rows: a family whose GGUF permutes the rows
of q and k (interleaved RoPE) is permuted when it is opened, so that no later stage has to know. Two things stay apart
until a file is written: each expert has matrices of its own (`blk.3.ffn_up_exps.17.weight`), and kv_b is one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rondel.converters.hyperparameters import Hyperparameters

Site = Literal[
    "residual",
    "attn_in",
    "queries",
    "keys",
    "values",
    "heads",
    "ffn_in",
    "hidden",
    "output_in",
    "q_latent",
    "q_latent_in",
    "kv_latent",
    "kv_latent_in",
    "nope",
    "routes",
    "hidden_experts",
    "hidden_shared",
]


@dataclass(frozen=True)
class Linear:
    """One matrix of a block: (rows, cols) = (what it writes, what it reads). A size of 0: this model has none."""

    role: str  # canonical: blk.N.{role}.weight, or blk.N.{role}.E.weight for expert E
    source: str  # Hugging Face: model.layers.N.{source}.weight; {expert} stands for the expert
    reads: Site
    writes: Site
    rows: str  # dimension names, see Hyperparameters.size
    cols: str
    bias: bool = False  # may have one
    rope: bool = False  # its rows are turned by RoPE, and GGUF's order of them depends on the layout
    parts: tuple[tuple[Site, str], ...] = ()  # rows that write several sites: (site, size) in turn, for every head
    layers: Literal["all", "dense", "experts"] = "all"
    expert: bool = False  # one matrix for each routed expert
    stays_float: bool = False  # never quantized: its errors would choose other experts

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that its rows write."""
        return tuple(site for site, _ in self.parts) or (self.writes,)

    def is_in(self, layer: int, numbers: Hyperparameters) -> bool:
        """Whether a layer of this model has it."""
        dense = numbers.experts is None or layer < numbers.experts.dense
        here = self.layers == "all" or (self.layers == "dense") == dense
        return here and numbers.size(self.rows) > 0 and numbers.size(self.cols) > 0

    def tensors(self, layer: int, numbers: Hyperparameters, kind: str = "weight") -> dict[str, str]:
        """Canonical name to Hugging Face name of the tensors that a layer has of it, one or one for each expert."""
        prefix, count = f"model.layers.{layer}.", numbers.experts.count if self.expert and numbers.experts else 0
        if not self.is_in(layer, numbers):
            return {}
        if not self.expert:
            return {block_tensor(layer, self.role, kind): f"{prefix}{self.source}.{kind}"}
        return {
            block_tensor(layer, f"{self.role}.{expert}", kind): f"{prefix}{self.source.format(expert=expert)}.{kind}"
            for expert in range(count)
        }


@dataclass(frozen=True)
class Norm:
    """One RMSNorm of a block, (size,): reads a site, makes another; per head where `makes` is None."""

    role: str
    source: str
    reads: Site
    makes: Site | None
    size: str


@dataclass(frozen=True)
class Vector:
    """A tensor of a block that a model may have and that no change of basis touches, (size,)."""

    role: str  # canonical: blk.N.{role}
    source: str  # Hugging Face: model.layers.N.{source}
    size: str
    layers: Literal["all", "experts"] = "all"


@dataclass(frozen=True)
class Family:
    """A model family, as data. Stages ask this table, never the family's name."""

    name: str  # also GGUF's general.architecture
    architectures: tuple[str, ...]  # config.json's "architectures"
    linears: tuple[Linear, ...]
    norms: tuple[Norm, ...]
    rope_layout: Literal["interleaved", "half"]  # pairs (2i, 2i+1), or (i, i + head_dim/2)
    written_keys: tuple[str, ...] = ()  # GGUF hyperparameters beyond those of every family
    vectors: tuple[Vector, ...] = ()
    norm_offset: float = 0.0  # Hugging Face's gains lack it: added when a model is opened, as GGUF's converters do
    experts: bool = False
    latents: bool = False
    runs: bool = True  # False: it can be opened and rotated; its forward pass is not built yet

    def linear(self, role: str) -> Linear:
        """The linear of that role."""
        return next(linear for linear in self.linears if linear.role == role)

    def readers(self, site: str) -> tuple[Linear, ...]:
        """The linears of a block that read a site: they share its statistics."""
        return tuple(linear for linear in self.linears if linear.reads == site)

    def writers(self, site: str) -> tuple[Linear, ...]:
        """The linears of a block that write a site."""
        return tuple(linear for linear in self.linears if site in linear.sites)

    def linear_of(self, name: str) -> Linear | None:
        """The linear that a canonical tensor name belongs to."""
        role = name.split(".")[2] if name.startswith("blk.") else None
        return next((linear for linear in self.linears if linear.role == role), None)

    def added_to(self, name: str) -> float:
        """What the tensor of that canonical name holds more than Hugging Face's."""
        role = name.split(".")[2] if name.startswith("blk.") else None
        normed = name == OUTPUT_NORM or any(norm.role == role for norm in self.norms)
        return self.norm_offset if normed else 0.0

    def norm_making(self, site: str) -> Norm | None:
        """The norm whose output is that site."""
        return next((norm for norm in self.norms if norm.makes == site), None)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites of a block that a linear reads, in the order of the forward pass."""
        return tuple(dict.fromkeys(linear.reads for linear in self.linears))


# The tensors outside the blocks, and their Hugging Face names; the same in every family so far.
EMBEDDING = "token_embd.weight"
OUTPUT_NORM = "output_norm.weight"
OUTPUT = "output.weight"
ROPE_FACTORS = "rope_freqs.weight"
OUTER_SOURCES = {
    EMBEDDING: "model.embed_tokens.weight",
    OUTPUT_NORM: "model.norm.weight",
    OUTPUT: "lm_head.weight",
}


def block_tensor(layer: int, role: str, kind: str = "weight") -> str:
    """The canonical name of a block's tensor."""
    return f"blk.{layer}.{role}.{kind}"


def canonical_shapes(family: Family, numbers: Hyperparameters) -> dict[str, tuple[int, ...]]:
    """Every tensor that a float checkpoint of this family has, in canonical order, with its shape.

    `optional_shapes` are left out.
    """
    embedding = (numbers.vocabulary, numbers.width)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: embedding}
    for layer in range(numbers.layers):
        for norm in family.norms:
            if size := numbers.size(norm.size):
                shapes[block_tensor(layer, norm.role)] = (size,)
        for linear in family.linears:
            shape = (numbers.size(linear.rows), numbers.size(linear.cols))
            shapes |= dict.fromkeys(linear.tensors(layer, numbers), shape)
    shapes[OUTPUT_NORM] = (numbers.width,)
    if not numbers.tied:
        shapes[OUTPUT] = embedding
    return shapes


def optional_shapes(family: Family, numbers: Hyperparameters) -> dict[str, tuple[int, ...]]:
    """The tensors that a float checkpoint of this family may have: biases, RoPE factors, vectors, a head of its own."""
    shapes: dict[str, tuple[int, ...]] = {
        OUTPUT: (numbers.vocabulary, numbers.width),
        ROPE_FACTORS: (numbers.rope_dim // 2,),
    }
    for layer in range(numbers.layers):
        for linear in family.linears:
            shapes |= dict.fromkeys(linear.tensors(layer, numbers, "bias"), (numbers.size(linear.rows),))
        for vector in family.vectors:
            if vector.layers == "all" or (numbers.experts is not None and layer >= numbers.experts.dense):
                shapes[f"blk.{layer}.{vector.role}"] = (numbers.size(vector.size),)
    return shapes
