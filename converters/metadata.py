"""The metadata of an exported file: the keys that llama.cpp's converter writes, and rondel's own (formats.md)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.family import Family
from rondel.converters.ggml_types import FILE_TYPES
from rondel.converters.gguf_keys import (
    FORMAT_VERSION,
    QUANTIZATION_VERSION,
    General,
    Model,
    Rondel,
    model_key,
)
from rondel.converters.gguf_writer import HASH_DIGITS, Value
from rondel.converters.hyperparameters import Hyperparameters
from rondel.converters.rotation import Rotation
from rondel.converters.side_files import read_json

# general.file_type of the named mixtures; a bare K type means its medium mixture, as in llama.cpp.
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
_FILE_TYPES = FILE_TYPES | {
    kind.name.removeprefix("MOSTLY_").removeprefix("ALL_"): int(kind)
    for kind in gguf.LlamaFileType
    if kind is not gguf.LlamaFileType.GUESSED
}

# Sampling defaults: generation_config.json's name, the gguf package's name, and the type of the value.
_SAMPLING: tuple[tuple[str, str, type], ...] = (
    ("sequence", "sampling_sequence", str),
    ("top_k", "sampling_top_k", int),
    ("top_p", "sampling_top_p", float),
    ("min_p", "sampling_min_p", float),
    ("xtc_probability", "sampling_xtc_probability", float),
    ("xtc_threshold", "sampling_xtc_threshold", float),
    ("temperature", "sampling_temp", float),
    ("penalty_last_n", "sampling_penalty_last_n", int),
    ("penalty_repeat", "sampling_penalty_repeat", float),
    ("mirostat", "sampling_mirostat", int),
    ("mirostat_tau", "sampling_mirostat_tau", float),
    ("mirostat_eta", "sampling_mirostat_eta", float),
)


def file_type(name: str) -> int | None:
    """general.file_type of a type or mixture; None for those that llama.cpp has no number for."""
    return _FILE_TYPES.get(_ALIASES.get(name, name))


def _sampling(generation: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling defaults that have the type they should have."""
    found = {}
    for key, field, kind in _SAMPLING:
        value = generation.get(key)
        value = float(value) if kind is float and type(value) is int else value
        if type(value) is kind:
            found[field] = value
    return found


def _model_card(root: Path) -> dict[str, Any]:
    """The front matter of README.md."""
    try:
        return dict(gguf.Metadata.load_model_card(root))
    except Exception:  # whatever stands in a README, it must not stop an export
        return {}


def _describe(source: Checkpoint, name: str | None, parameters: int, card: dict[str, Any]) -> gguf.Metadata:
    files = source.side_files()
    folder = Path(name or source.manifest["source"]["name"])
    config = read_json(files.get("config.json"))
    described = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(name=name), card, config, folder, parameters)
    if described.name is None:
        described.name = folder.name
    if described.size_label is None and parameters > 0:
        described.size_label = gguf.size_label(parameters, parameters, 0, 0)
    return replace(described, **_sampling(read_json(files.get("generation_config.json"))))


def describe(source: Checkpoint, name: str | None, parameters: int) -> gguf.Metadata:
    """Name, size label, licence and the like, found as llama.cpp's converter finds them.

    A given name replaces the folder's; `parameters` counts the weights of all tensors. A model card that says something
    else than cards do is left out.
    """
    try:
        described = _describe(source, name, parameters, _model_card(source.root))
        described.set_gguf_meta_model(gguf.GGUFWriter(None, source.family.name))
    except (ValueError, TypeError, AttributeError, KeyError):
        described = _describe(source, name, parameters, {})
    return described


def file_name(described: gguf.Metadata, encoding: str) -> str:
    """GGUF's naming convention: BaseName-SizeLabel[-FineTune][-Version]-Encoding.gguf."""
    named = gguf.naming_convention(
        described.name, described.basename, described.finetune, described.version, described.size_label, encoding
    )
    return re.sub(r"[^\w.+-]", "-", named) + ".gguf"


def _general_keys(architecture: str, described: gguf.Metadata) -> dict[str, Value]:
    """The general.* keys as the gguf package orders and types them."""
    writer = gguf.GGUFWriter(None, architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    described.set_gguf_meta_model(writer)
    typed = {key: _typed(held) for key, held in writer.kv_data[0].items()}
    return {key: value for key, value in typed.items() if _is_plain(value)}


def _typed(held: gguf.GGUFValue) -> Value:
    """A value of the gguf package; its 32-bit numbers are the writer's plain ones."""
    if held.type is gguf.GGUFValueType.INT32:
        return np.int32(held.value)
    if held.type is gguf.GGUFValueType.FLOAT32:
        return float(held.value)
    return held.value


def _is_plain(value: Value) -> bool:
    """Whether a value can stand in a file: a model card may hold anything."""
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, str | bool | int | float | np.integer)


def model_keys(family: Family, numbers: Hyperparameters) -> dict[str, Value]:
    """The hyperparameters under the family's name."""
    keys: dict[str, Value] = {
        Model.BLOCK_COUNT: numbers.layers,
        Model.CONTEXT_LENGTH: numbers.context,
        Model.EMBEDDING_LENGTH: numbers.width,
        Model.FEED_FORWARD_LENGTH: numbers.hidden,
        Model.HEAD_COUNT: numbers.heads,
        Model.HEAD_COUNT_KV: numbers.kv_heads,
    }
    scaling = numbers.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        keys[Model.ROPE_SCALING_TYPE] = "linear"
        keys[Model.ROPE_SCALING_FACTOR] = float(scaling["factor"])
    keys[Model.ROPE_FREQ_BASE] = float(numbers.rope_base)
    keys[Model.LAYER_NORM_RMS_EPSILON] = float(numbers.norm_epsilon)
    named = {
        Model.KEY_LENGTH: numbers.head_dim,
        Model.VALUE_LENGTH: numbers.head_dim,
        Model.VOCAB_SIZE: numbers.vocabulary,
        Model.ROPE_DIMENSION_COUNT: numbers.head_dim,
    }
    told = set(family.written_keys)
    if numbers.head_dim * numbers.heads != numbers.width:  # cannot be derived
        told |= {Model.KEY_LENGTH, Model.VALUE_LENGTH}
    keys |= {key: value for key, value in named.items() if key in told}
    return {model_key(family.name, key): value for key, value in keys.items()}


def rotation_keys(rotations: Sequence[Rotation]) -> dict[str, Value]:
    """The changes of basis, in the order of application."""
    if not rotations:
        return {}
    keys: dict[str, Value] = {Rondel.ROTATION_COUNT: len(rotations)}
    for index, rotation in enumerate(rotations):
        fields: dict[str, Value] = {
            "site": rotation.site,
            "kind": rotation.kind,
            "online": rotation.online,
            "size": rotation.size,
            "block": rotation.block,
        }
        if rotation.sha256 is not None:
            fields["sha256"] = rotation.sha256
        else:
            fields["signs"] = np.frombuffer(bytes.fromhex(rotation.signs), np.uint8)
        if rotation.layers is not None:
            fields["layers"] = np.array(rotation.layers, np.uint32)
        keys |= {Rondel.ROTATION.format(index=index, field=field): value for field, value in fields.items()}
    return keys


def provenance_keys(manifest: Mapping[str, Any]) -> dict[str, Value]:
    """Where the weights and the statistics come from; never a path."""
    keys: dict[str, Value] = {}
    found = manifest.get("source") or {}
    if found.get("name"):
        keys[Rondel.SOURCE_NAME] = Path(found["name"]).name
    keys[Rondel.SOURCE_SHA256] = found.get("sha256") or "0" * HASH_DIGITS  # zeros: not computed yet
    calibration = manifest.get("calibration") or {}
    if calibration.get("sha256"):
        keys[Rondel.CALIBRATION_SHA256] = calibration["sha256"]
    if calibration.get("tokens") is not None:
        keys[Rondel.CALIBRATION_TOKENS] = np.uint64(calibration["tokens"])
    return keys


def standard_keys(
    source: Checkpoint, numbers: Hyperparameters, described: gguf.Metadata, encoding: str, architecture: str
) -> dict[str, Value]:
    """Everything that llama.cpp's converter writes before the tokenizer."""
    keys = _general_keys(architecture, described)
    keys |= model_keys(source.family, numbers)
    number = file_type(encoding)
    if number is not None:
        keys[General.FILE_TYPE] = number
    keys[General.QUANTIZATION_VERSION] = QUANTIZATION_VERSION
    return keys


def extension_version() -> np.ndarray:
    """The value of rondel.version."""
    return np.array(FORMAT_VERSION, np.uint32)
