"""The numbers of one model, and the sizes that the tables of its family name."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Experts:
    """The numbers of a mixture of experts."""

    count: int  # routed experts of a layer
    used: int  # of them for a token
    hidden: int  # channels between up and down of one expert
    shared: int = 0  # the same of the shared experts, which are one matrix; 0: none
    dense: int = 0  # layers before the first one with experts
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalized: bool = False  # the weights of the chosen ones are made to add up to one
    scale: float = 1.0  # of the routed experts' sum
    groups: int = 1  # experts are chosen from the best `used_groups` of these
    used_groups: int = 1


@dataclass(frozen=True)
class Latents:
    """The numbers of latent attention (MLA)."""

    queries: int  # channels of the queries' latent; 0: q reads the stream
    keys_values: int
    nope: int  # of a head's query and key, without RoPE
    rope: int  # of a head's query, with RoPE; and of the one key that all heads share
    values: int  # of a head's value


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
    experts: Experts | None = None
    latents: Latents | None = None

    @property
    def value_dim(self) -> int:
        """Channels of one head's values."""
        return self.latents.values if self.latents else self.head_dim

    @property
    def rope_dim(self) -> int:
        """Channels of a head that RoPE turns."""
        return self.latents.rope if self.latents else self.head_dim

    @property
    def key_heads(self) -> int:
        """Keys of one position that RoPE turns: latent attention shares one."""
        return 1 if self.latents else self.kv_heads

    def size(self, dimension: str) -> int:
        """The number of channels of a dimension that the family tables name; 0 where this model has none."""
        sizes = {
            "width": self.width,
            "hidden": self.hidden,
            "queries": self.heads * self.head_dim,
            "keys": self.kv_heads * self.head_dim,
            "values": self.kv_heads * self.value_dim,
            "attended": self.heads * self.value_dim,
            "head_dim": self.head_dim,
            "rope_of_keys": self.key_heads * self.rope_dim,
            "vocabulary": self.vocabulary,
        }
        if experts := self.experts:
            sizes |= {"experts": experts.count, "expert_hidden": experts.hidden, "shared_hidden": experts.shared}
        if latents := self.latents:
            sizes |= {
                "q_latent": latents.queries,
                "queries_of_latent": self.heads * self.head_dim if latents.queries else 0,
                "queries_of_stream": 0 if latents.queries else self.heads * self.head_dim,
                "kv_latent": latents.keys_values,
                "kv_latent_and_rope": latents.keys_values + latents.rope,
                "nope_and_values": self.heads * (latents.nope + latents.values),
                "nope": latents.nope,
                "nope_of_heads": self.heads * latents.nope,
                "rope": latents.rope,
                "value": latents.values,
            }
        return sizes[dimension]

    def to_json(self) -> dict[str, Any]:
        """The dictionary that manifest.json holds."""
        return {key: value for key, value in asdict(self).items() if key not in PARTS or value is not None}

    @staticmethod
    def from_json(record: dict[str, Any]) -> Hyperparameters:
        """The numbers back from a manifest."""
        parts = {name: kind(**record[name]) for name, kind in PARTS.items() if record.get(name) is not None}
        return Hyperparameters(**{**record, **parts})


PARTS: dict[str, Any] = {"experts": Experts, "latents": Latents}  # that few families have
