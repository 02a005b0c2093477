"""A rotation is data: the same record is applied, saved in the manifest, written to GGUF keys and executed online.

Its site says which vectors turn, its size how many channels of them have a sign of their own:

    residual    the residual stream; size: its width
    heads       what attn_output reads; size: heads * channels of a head's value. Query heads that share a key-value
                head have the same signs, and the rows of attn_v turn by those of one of them
    hidden      what ffn_down reads. Likewise hidden_experts (one record for all experts) and hidden_shared
    q_latent    the latent of the queries, before its norm and behind it
    kv_latent   the latent of keys and values alike; the keys that RoPE turns come from other rows and stay
    nope        a head's query and key without RoPE; size: heads * channels, every head has its own signs
    rope_pairs  keys before RoPE, and the queries that meet them; size: key-value heads * head_dim
    queries     online. Queries and keys alike, behind RoPE and the norms that some families have there; size: head_dim.
                Every head of both turns by the same signs
    boundary    online. The ends of the residual stream where a tied head keeps its basis: a looked-up row x becomes
                R(x), and of the stream y the output norm, whose gain stays, gets R^-1(y). Size, block and signs are
                those of the fused record of the residual stream, which stands beside it
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from rondel.converters.hyperparameters import Hyperparameters
from rondel.converters.manifest import digest_of

if TYPE_CHECKING:
    import torch

HADAMARD, ORTHOGONAL = "hadamard", "orthogonal"
MATRICES = "rotations"  # the shard of the matrices in a checkpoint's folder; it travels beside the tensors
GAINS = "gains"  # likewise of the gains that folding took out of the norms
BASIS = ("site", "kind", "online", "size", "block", "signs", "layers", "sha256")  # what of a record decides the basis


def matrix_name(index: int) -> str:
    """The tensor that holds the matrix of a model's rotation `index`."""
    return f"rotation.{index}"


def basis_hash(records: Sequence[dict[str, Any]]) -> str | None:
    """A hash of the basis that a manifest's rotations lead to; None for the basis that a model came in."""
    return digest_of([{key: record.get(key) for key in BASIS} for record in records]) if records else None


@dataclass(frozen=True)
class Rotation:
    """A map of the row vectors x at a site, block by block of their channels (formats.md, section 3).

    hadamard: x <- H (s o x) / sqrt(block). `signs` holds s, one bit a channel, least significant first (1 = minus), as
    hexadecimal text. orthogonal: x <- x M, with n matrices M for the size / block blocks, in equal runs. Only fused.
    """

    site: str  # "residual", "heads", "hidden", ...
    kind: str  # HADAMARD or ORTHOGONAL
    online: bool
    size: int  # channels of the site
    block: int  # block-diagonal where block < size
    signs: str = ""
    layers: tuple[int, ...] | None = None  # None: all
    seed: int | None = None  # of the signs, or of the matrix that an optimised one started from
    sha256: str | None = None  # of the matrices' bytes
    matrix: torch.Tensor | None = field(default=None, compare=False, repr=False)  # (n, block, block) float64, if read

    def to_json(self) -> dict[str, Any]:
        """The record of the manifest; a matrix is told by its hash."""
        told = {part.name: getattr(self, part.name) for part in fields(self) if part.name != "matrix"}
        return told | {"layers": None if self.layers is None else list(self.layers)}

    @staticmethod
    def from_json(record: dict[str, Any]) -> Rotation:
        """The record back from a manifest, without its matrix. Raises ValueError for one that cannot be."""
        layers = record.get("layers")
        rotation = Rotation(**{**record, "layers": None if layers is None else tuple(layers)})
        dense = rotation.kind == ORTHOGONAL
        if not (dense or rotation.kind == HADAMARD) or dense != (rotation.sha256 is not None):
            raise ValueError(f"rotation of kind {rotation.kind!r}")
        if dense and rotation.online:
            raise ValueError(f"a matrix for {rotation.site}, which turns online")
        if rotation.block < 1 or rotation.size % rotation.block:
            raise ValueError(f"rotation of {rotation.size} channels in blocks of {rotation.block}")
        if len(bytes.fromhex(rotation.signs)) != (0 if dense else (rotation.size + 7) // 8):
            raise ValueError(f"signs of a rotation of {rotation.size} channels")
        return rotation


SIZES = {  # the dimension of each site, see Hyperparameters.size
    "residual": "width",
    "boundary": "width",
    "heads": "attended",
    "hidden": "hidden",
    "hidden_experts": "expert_hidden",
    "hidden_shared": "shared_hidden",
    "q_latent": "q_latent",
    "kv_latent": "kv_latent",
    "nope": "nope_of_heads",
    "rope_pairs": "rope_of_keys",
    "queries": "head_dim",
}


def site_size(numbers: Hyperparameters, site: str) -> int:
    """The channels that a rotation of a site has signs for. Raises KeyError where the model has no such site."""
    return numbers.size(SIZES[site])
