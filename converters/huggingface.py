"""A Hugging Face folder seen as a Checkpoint, and a Checkpoint's tensors under transformers' names.

Nothing is copied: the folder is checked when it is opened, and a tensor is read, checked and put into canonical
row order when a stage asks for it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import (
    EMBEDDING,
    OUTER_SOURCES,
    OUTPUT,
    ROPE_FACTORS,
    Family,
    Linear,
    block_tensor,
    canonical_shapes,
    optional_shapes,
)
from rondel.converters.folder import FLOAT_FORMATS, TensorInfo, sha256_of
from rondel.converters.hyperparameters import Hyperparameters
from rondel.converters.manifest import digest_of
from rondel.converters.model_config import CONFIG, family_of, hyperparameters, read_config
from rondel.converters.weights import Weights

# Buffers that old checkpoints hold and that every reader computes itself.
COMPUTED_BUFFERS = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attn.bias")


def interleave_rows(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k (heads * head_dim, ...) from RoPE pairs (i, i + head_dim/2) to pairs (2i, 2i+1)."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def separate_rows(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `interleave_rows`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def rope_factors(numbers: Hyperparameters) -> torch.Tensor | None:
    """What `rope_freqs.weight` holds, (head_dim / 2,) F32: each frequency is divided by it. None without llama3.

    Wavelengths below the short limit stay, above the long limit are stretched by `factor`, between them are blended.
    """
    scaling = numbers.rope_scaling
    if scaling is None or scaling["rope_type"] != "llama3":
        return None
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    trained = scaling["original_max_position_embeddings"]
    exponents = torch.arange(0, numbers.head_dim, 2, dtype=torch.float32) / numbers.head_dim
    wavelengths = 2 * math.pi / (1.0 / numbers.rope_base**exponents)
    blend = (trained / wavelengths - low) / (high - low)
    blended = 1 / ((1 - blend) / factor + blend)
    factors = torch.where(wavelengths > trained / low, torch.full_like(wavelengths, factor), blended)
    return torch.where(wavelengths < trained / high, torch.ones_like(wavelengths), factors)


def _source_names(family: Family, numbers: Hyperparameters) -> dict[str, tuple[str, str | None]]:
    """Canonical name to (Hugging Face name, the dimension of its RoPE rows), biases included."""
    names: dict[str, tuple[str, str | None]] = {name: (source, None) for name, source in OUTER_SOURCES.items()}
    for layer in range(numbers.layers):
        prefix = f"model.layers.{layer}."
        for norm in family.norms:
            names[block_tensor(layer, norm.role)] = (f"{prefix}{norm.source}.weight", None)
        for linear in family.linears:
            turned = linear.rows if linear.rope and family.rope_layout == "interleaved" else None
            for kind in ("weight", "bias") if linear.bias else ("weight",):
                names |= {name: (source, turned) for name, source in linear.tensors(layer, numbers, kind).items()}
        for vector in family.vectors:
            names[f"blk.{layer}.{vector.role}"] = (prefix + vector.source, None)
    return names


class HuggingFaceCheckpoint(Checkpoint):
    """An HF folder under canonical names; it has no manifest on disk, so its hashes are computed when asked for."""

    shareable = False

    def __init__(self, root: Path, manifest: dict[str, Any], weights: Weights, sources: dict[str, str]) -> None:
        super().__init__(root, manifest)
        self._weights = weights
        self._sources = sources
        self._factors = rope_factors(self.numbers)
        self._hashed: dict[str, str] = {}

    def _raw(self, name: str) -> torch.Tensor:
        """A tensor as it is stored; NaN and infinity are refused."""
        if name == ROPE_FACTORS:
            assert self._factors is not None
            return self._factors.clone()
        source = self._sources[name]
        raw = self._weights.read(source)
        if not bool(torch.isfinite(raw).all()):
            bad = int((~torch.isfinite(raw)).sum())
            raise RondelError(
                f"{self.root / self._weights.files[source]}: tensor {source} holds {bad} NaN or infinite values; "
                "the checkpoint is damaged, download it again"
            )
        return raw

    def info(self, name: str) -> TensorInfo:
        """Shape, format and place of a tensor, with the hash of its bytes as stored once they were hashed."""
        found = super().info(name)
        return replace(found, sha256=self._hashed[name]) if name in self._hashed else found

    def read(self, name: str) -> torch.Tensor:
        """A tensor in canonical row order, as precise as it is stored; NaN and infinity are refused."""
        self.info(name)  # refuses an unknown name
        raw = self._raw(name)
        turned, added = self._turned(name), self.family.added_to(name)
        if added:
            return raw.to(torch.float32) + added
        if turned is None:
            return raw.contiguous()
        return interleave_rows(raw, self.numbers.size(turned) // self.numbers.head_dim).contiguous()

    def _turned(self, name: str) -> str | None:
        """The dimension name of the rows that RoPE turns, where they are stored in another order."""
        return self.manifest["tensors"][name].get("turned")

    def _hash(self) -> None:
        """Hash every tensor once, one in memory at a time; a stage does so before it writes anything."""
        for name in self.names():
            if name not in self._hashed:
                self._hashed[name] = sha256_of(self._raw(name))

    def carried(self) -> dict[str, Any]:
        """The part of the manifest that the next stage's manifest starts from, with the source's hash filled in."""
        self._hash()
        entries = {name: [self.info(name).format, self.info(name).shape, sha] for name, sha in self._hashed.items()}
        source = {"name": self.manifest["source"]["name"], "sha256": digest_of(entries)}
        return {**super().carried(), "source": source}

    def fingerprint(self) -> str:
        """A hash of all weights, the numbers and the side files; a changed file changes it."""
        return digest_of([self.carried(), self.side_file_hashes()])


def _check_tensor(root: Path, name: str, source: str, expected: tuple[int, ...], weights: Weights) -> None:
    if source not in weights.files:
        raise RondelError(f"{root}: tensor {source} is missing ({name}, shape {list(expected)})")
    place = root / weights.files[source]
    if weights.shapes[source] != expected:
        raise RondelError(
            f"{place}: tensor {source} has the shape {list(weights.shapes[source])}, {CONFIG} says {list(expected)}"
        )
    if weights.formats[source] not in FLOAT_FORMATS.values():
        raise RondelError(f"{place}: tensor {source} is {weights.formats[source]}, expected F32, F16 or BF16")


def _is_tied(numbers: Hyperparameters, weights: Weights) -> bool:
    """Whether the head is the embedding; as in transformers, two tensors that differ are not tied."""
    head, embedding = OUTER_SOURCES[OUTPUT], OUTER_SOURCES[EMBEDDING]
    if not numbers.tied or head not in weights.files or embedding not in weights.files:
        return numbers.tied
    if weights.shapes[head] != weights.shapes[embedding] or weights.formats[head] != weights.formats[embedding]:
        return False
    return torch.equal(weights.read(head), weights.read(embedding))


def _with_biases(
    family: Family, numbers: Hyperparameters, weights: Weights, always: bool
) -> dict[str, tuple[int, ...]]:
    """The canonical shapes, with the biases that this checkpoint has: in every block or in none."""
    sources = _source_names(family, numbers)
    layers = range(numbers.layers)
    biased = {
        linear.role
        for linear in family.linears
        if linear.bias
        and (
            always
            or any(s in weights.files for layer in layers for s in linear.tensors(layer, numbers, "bias").values())
        )
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in canonical_shapes(family, numbers).items():
        shapes[name] = shape
        if name == EMBEDDING and (factors := rope_factors(numbers)) is not None:
            shapes[ROPE_FACTORS] = tuple(factors.shape)
        _, _, rest = name.partition("blk.")
        if rest.endswith(".weight") and rest.split(".")[1] in biased:
            shapes[name.removesuffix("weight") + "bias"] = shape[:1]
    for name, shape in optional_shapes(family, numbers).items():
        vector = any(name.endswith(f".{vector.role}") for vector in family.vectors)
        if vector and sources[name][0] in weights.files:
            shapes[name] = shape
    return shapes


def _refuse_unknown_tensors(root: Path, weights: Weights, known: set[str]) -> None:
    unknown = [name for name in weights.files if name not in known and not name.endswith(COMPUTED_BUFFERS)]
    if unknown:
        raise RondelError(
            f"{root / weights.files[unknown[0]]}: tensor {unknown[0]} is not part of this architecture"
            f" ({len(unknown)} such tensors); is {CONFIG} the one of these weights?"
        )


def open_huggingface(root: Path) -> HuggingFaceCheckpoint:
    """Open an HF folder: safetensors or pytorch_model.bin, one file or sharded, F32, F16 or BF16.

    Every name, shape and format is checked against config.json and the family's table before a weight is read.
    """
    config = read_config(root)
    family = family_of(config, root / CONFIG)
    numbers = hyperparameters(config, root / CONFIG, family)
    weights = Weights(root)
    if numbers.layers > len(weights.files):
        raise RondelError(
            f"{root / CONFIG}: num_hidden_layers is {numbers.layers}, the weights are only {len(weights.files)} tensors"
        )
    numbers = replace(numbers, tied=_is_tied(numbers, weights))
    shapes = _with_biases(family, numbers, weights, always=config.get("attention_bias") is True)
    sources = _source_names(family, numbers)
    tensors: dict[str, dict[str, Any]] = {}
    for name, shape in shapes.items():
        if name == ROPE_FACTORS:
            tensors[name] = {"shape": shape, "format": "F32", "shard": CONFIG, "sha256": ""}
            continue
        source, turned = sources[name]
        _check_tensor(root, name, source, shape, weights)
        stored = "F32" if family.added_to(name) else weights.formats[source]
        entry = {"shape": shape, "format": stored, "shard": weights.files[source], "sha256": ""}
        tensors[name] = entry | ({"turned": turned} if turned else {})
    known = {sources[name][0] for name in shapes if name != ROPE_FACTORS}
    _refuse_unknown_tensors(root, weights, known | ({OUTER_SOURCES[OUTPUT]} if numbers.tied else set()))
    manifest = {
        "kind": "checkpoint",
        "family": family.name,
        "hyperparameters": numbers.to_json(),
        "source": {"name": root.resolve().name, "sha256": ""},
        "rotations": [],
        "stages": [],
        "tensors": tensors,
    }
    return HuggingFaceCheckpoint(
        root, manifest, weights, {name: sources[name][0] for name in shapes if name in sources}
    )


def huggingface_block(checkpoint: Checkpoint, layer: int) -> dict[str, torch.Tensor]:
    """One block in F32 under the names of transformers' decoder layer, rows of q and k in its order."""
    numbers = checkpoint.numbers
    prefix = f"model.layers.{layer}."
    block: dict[str, torch.Tensor] = {}
    for name, (source, turned) in _source_names(checkpoint.family, numbers).items():
        if source.startswith(prefix) and name in checkpoint:
            tensor = huggingface_gain(checkpoint, name)
            heads = numbers.size(turned) // numbers.head_dim if turned else 0
            block[source.removeprefix(prefix)] = separate_rows(tensor, heads).contiguous() if turned else tensor
    return block


def huggingface_gain(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor in F32; a norm's gain without what the family adds to it."""
    tensor, added = checkpoint.read_float(name), checkpoint.family.added_to(name)
    return tensor - added if added else tensor


def huggingface_rows(checkpoint: Checkpoint, linear: Linear, weights: torch.Tensor) -> torch.Tensor:
    """A block's matrix (rows, cols) with its rows in transformers' order."""
    if not (linear.rope and checkpoint.family.rope_layout == "interleaved"):
        return weights
    numbers = checkpoint.numbers
    return separate_rows(weights, numbers.size(linear.rows) // numbers.head_dim).contiguous()


def huggingface_outer(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The tensors outside the blocks in F32, under transformers' names; `lm_head.weight` only where untied."""
    return {source: huggingface_gain(checkpoint, name) for name, source in OUTER_SOURCES.items() if name in checkpoint}


def huggingface_config(checkpoint: Checkpoint) -> Any:
    """The transformers config of this checkpoint as it is now, for F32: a rotated one has a head of its own."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint.root, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise RondelError(f"{checkpoint.root / CONFIG}: transformers cannot read it ({error})") from error
    config.tie_word_embeddings = OUTPUT not in checkpoint
    config.dtype = torch.float32
    config.sliding_window = None
    if hasattr(config, "layer_types"):
        config.layer_types = ["full_attention"] * checkpoint.numbers.layers
    return config
