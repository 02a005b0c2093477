"""What a model family is: the linears with the sites they read and write, the norms, and the facts stages ask for.

Sites are places where activations stand:

    residual -> [attn_norm] -> attn_in -> q, k, v -> heads -> attn_output -> residual
    residual -> [ffn_norm]  -> ffn_in  -> gate, up -> hidden -> down -> residual
    residual -> [output_norm] -> output_in -> output

Canonical names are GGUF's (`blk.3.attn_q.weight`), and so is the order of rows: a family whose GGUF permutes the rows
of q and k (interleaved RoPE) is permuted when it is opened, so that no later stage has to know.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Site = Literal["residual", "attn_in", "queries", "keys", "values", "heads", "ffn_in", "hidden", "output_in"]


@dataclass(frozen=True)
class Hyperparameters:
    """The numbers of one model. Sizes are counts of channels unless said otherwise."""

    vocabulary: int
    context: int  # trained context length in tokens
    width: int  # the residual stream
    layers: int
    hidden: int  # between ffn_up and ffn_down
    heads: int
    kv_heads: int
    head_dim: int
    norm_epsilon: float
    rope_base: float
    tied: bool  # the head is the embedding
    rope_scaling: dict[str, Any] | None = None  # config.json's own, already checked

    def size(self, dimension: str) -> int:
        """The number of channels of a dimension that the family tables name."""
        return {
            "width": self.width,
            "hidden": self.hidden,
            "queries": self.heads * self.head_dim,
            "keys": self.kv_heads * self.head_dim,
            "values": self.kv_heads * self.head_dim,
            "head_dim": self.head_dim,
            "vocabulary": self.vocabulary,
        }[dimension]

    def to_json(self) -> dict[str, Any]:
        """The dictionary that manifest.json holds."""
        return asdict(self)


@dataclass(frozen=True)
class Linear:
    """One matrix of a block: (rows, cols) = (what it writes, what it reads)."""

    role: str  # canonical: blk.N.{role}.weight
    source: str  # Hugging Face: model.layers.N.{source}.weight
    reads: Site
    writes: Site
    rows: str  # dimension names, see Hyperparameters.size
    cols: str
    bias: bool = False  # may have one
    rope: bool = False  # its rows are turned by RoPE, so their order depends on the layout


@dataclass(frozen=True)
class Norm:
    """One RMSNorm of a block, (size,): reads a site, makes another; per head where `makes` is None."""

    role: str
    source: str
    reads: Site
    makes: Site | None
    size: str


@dataclass(frozen=True)
class Family:
    """A model family, as data. Stages ask this table, never the family's name."""

    name: str  # also GGUF's general.architecture
    architectures: tuple[str, ...]  # config.json's "architectures"
    linears: tuple[Linear, ...]
    norms: tuple[Norm, ...]
    rope_layout: Literal["interleaved", "half"]  # pairs (2i, 2i+1), or (i, i + head_dim/2)
    written_keys: tuple[str, ...] = ()  # GGUF hyperparameters beyond those of every family

    def linear(self, role: str) -> Linear:
        """The linear of that role."""
        return next(linear for linear in self.linears if linear.role == role)

    def readers(self, site: str) -> tuple[Linear, ...]:
        """The linears of a block that read a site: they share its statistics."""
        return tuple(linear for linear in self.linears if linear.reads == site)

    def writers(self, site: str) -> tuple[Linear, ...]:
        """The linears of a block that write a site."""
        return tuple(linear for linear in self.linears if linear.writes == site)

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

    Biases are left out: they are optional and have the shape (rows,) of their linear.
    """
    embedding = (numbers.vocabulary, numbers.width)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: embedding}
    for layer in range(numbers.layers):
        for norm in family.norms:
            shapes[block_tensor(layer, norm.role)] = (numbers.size(norm.size),)
        for linear in family.linears:
            shapes[block_tensor(layer, linear.role)] = (numbers.size(linear.rows), numbers.size(linear.cols))
    shapes[OUTPUT_NORM] = (numbers.width,)
    if not numbers.tied:
        shapes[OUTPUT] = embedding
    return shapes
