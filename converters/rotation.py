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

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Rotation:
    """x <- H (s o x) / sqrt(block) on each block of the channels of a site (formats.md, section 3).

    `signs` holds one bit a channel, least significant first (1 = minus), as hexadecimal text.
    """

    site: str  # "residual", "heads", "hidden", ...
    kind: str  # "hadamard" or "orthogonal"
    online: bool
    size: int  # channels of the site
    block: int  # block-diagonal where block < size
    signs: str
    layers: tuple[int, ...] | None = None  # None: all

    def to_json(self) -> dict[str, Any]:
        """The record of the manifest."""
        return asdict(self)

    @staticmethod
    def from_json(record: dict[str, Any]) -> Rotation:
        """The record back from a manifest."""
        layers = record.get("layers")
        return Rotation(**{**record, "layers": None if layers is None else tuple(layers)})
