"""Replication to GGUF keys and back: flat arrays, and one base64 string of 16-bit words for all parameters.

Entry e of `ent.*` is one parameter of one set: its kind, its encoding, where its words start in the payload and how
many elements it has. Dense: one float16 a channel; of a low-rank term, row after row, so the length tells the rank.
Sparse: pairs (u16 channel, float16); channels that are not listed keep the value that changes nothing. Integer: one
int16.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from rondel.converters.errors import RondelError
from rondel.converters.hyperparameters import Hyperparameters
from rondel.converters.replication import VERSION, Replication, Step, check, mirror
from rondel.converters.replication_kinds import KINDS, ParameterSet, kind_shape, kind_size

PREFIX = "rondel.replication."
DENSE, SPARSE, INTEGER = 0, 1, 2  # ent.enc
INDEX_LIMIT = 1 << 16  # channels that a sparse entry can name
WORDS_LIMIT = 1 << 28
EVALUATION = "eval."
# What was measured; a name that begins with "rival_" is the KL divergence of another use of the copies' bytes.
EVALUATION_TYPES = {
    **dict.fromkeys(("nll_base", "nll_repl", "kl_base", "kl_repl", "ci_lo", "ci_hi"), "a float32 number"),
    **dict.fromkeys(("n_tokens", "n_ctx"), "an unsigned integer"),
    "corpus_sha256": "a string",
    "regression": "true or false",
}
RIVAL = "rival_"
STEP_FIELDS = {
    "step.layer": "layer",
    "step.pass": "number",
    "step.parts": "parts",
    "step.group": "group",
    "step.kv": "slot",
    "step.pset": "parameters",
}
ENTRY_ARRAYS = ("ent.kind", "ent.enc", "ent.off", "ent.len")
ARRAYS = (*STEP_FIELDS, "group.merge", "layer.pset", "pset.first", *ENTRY_ARRAYS)
SCALARS = ("version", "strict", "n_base", "payload", "payload.sha256", "base.sha256", "json")
_KIND_NAMES = {kind.number: name for name, kind in KINDS.items()}


def _encode(kind: str, values: np.ndarray) -> tuple[int, int, np.ndarray]:
    """Encoding, element count and little-endian words of one parameter: whichever of dense and sparse is shorter."""
    if KINDS[kind].whole:
        return INTEGER, 1, values.astype("<i2").view("<u2")
    halves = values.astype("<f2").reshape(-1)
    told = np.flatnonzero(halves != np.float16(KINDS[kind].identity))
    if values.ndim == 1 and len(values) <= INDEX_LIMIT and 2 * len(told) < len(values):
        pairs = np.stack([told.astype("<u2"), halves[told].view("<u2")], axis=1)
        return SPARSE, len(told), pairs.reshape(-1)
    return DENSE, len(halves), halves.view("<u2")


def encode_replication(found: Replication, numbers: Hyperparameters) -> dict[str, Any]:
    """The keys of a replication, checked, as the JSON values that a manifest keeps."""
    check(found, numbers)
    entries: dict[str, list[int]] = {name: [] for name in ENTRY_ARRAYS}
    first, words, offset = [0], [np.empty(0, "<u2")], 0
    for parameters in found.sets:
        for kind in sorted(parameters, key=lambda name: KINDS[name].number):
            encoding, length, data = _encode(kind, parameters[kind])
            for name, value in zip(ENTRY_ARRAYS, (KINDS[kind].number, encoding, offset, length), strict=True):
                entries[name].append(value)
            words.append(data)
            offset += len(data)
        first.append(len(entries["ent.kind"]))
    payload = np.concatenate(words).astype("<u2").tobytes()
    keys: dict[str, Any] = {"version": list(VERSION), "strict": found.strict, "n_base": found.layers}
    keys |= {name: [getattr(step, field) for step in found.steps] for name, field in STEP_FIELDS.items()}
    keys["group.merge"] = list(found.merges)
    if found.layer_sets:
        keys["layer.pset"] = list(found.layer_sets)
    if found.sets:
        keys |= {"pset.first": first, **entries}
    keys |= {
        "payload": base64.b64encode(payload).decode("ascii"),
        "payload.sha256": hashlib.sha256(payload).hexdigest(),
    }
    if found.base_sha256:
        keys["base.sha256"] = found.base_sha256
    keys |= {f"{EVALUATION}{name}": value for name, value in found.evaluation.items()}
    keys["json"] = mirror(found)
    return {PREFIX + name: value for name, value in keys.items()}


class _Keys:
    """The keys under the prefix, taken by name and checked for their type."""

    def __init__(self, keys: Mapping[str, Any]) -> None:
        self.values = {name.removeprefix(PREFIX): value for name, value in keys.items() if name.startswith(PREFIX)}

    def wrong(self, name: str, expected: str) -> RondelError:
        return RondelError(f"{PREFIX}{name}: expected {expected}; the file is damaged or was not made by rondel")

    def integers(self, name: str, required: bool = True) -> list[int]:
        value = self.values.get(name)
        if value is None and not required:
            return []
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise self.wrong(name, "an array of integers")
        listed = list(value)
        if any(isinstance(item, bool | np.bool_) or not isinstance(item, int | np.integer) for item in listed):
            raise self.wrong(name, "an array of integers")
        return [int(item) for item in listed]

    def integer(self, name: str) -> int:
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise self.wrong(name, "an integer")
        return int(value)

    def text(self, name: str) -> str:
        value = self.values.get(name, "")
        if not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def evaluation(self) -> dict[str, Any]:
        """What was measured; keys that a newer version adds are kept as they are."""
        found: dict[str, Any] = {}
        for key, value in self.values.items():
            name = key.removeprefix(EVALUATION)
            if not key.startswith(EVALUATION):
                continue
            expected = "a float32 number" if name.startswith(RIVAL) else EVALUATION_TYPES.get(name)
            if expected and not _is(value, expected):
                raise self.wrong(key, expected)
            found[name] = value
        return found

    def flag(self, name: str) -> bool:
        value = self.values.get(name, False)
        if not isinstance(value, bool | np.bool_):
            raise self.wrong(name, "true or false")
        return bool(value)


def _is(value: Any, expected: str) -> bool:
    """Whether a value is what EVALUATION_TYPES calls so."""
    if expected == "a float32 number":
        return isinstance(value, float | np.floating)
    if expected == "an unsigned integer":
        return isinstance(value, int | np.integer) and not isinstance(value, bool) and 0 <= int(value) < 1 << 32
    return isinstance(value, str if expected == "a string" else bool | np.bool_)


def _payload(keys: _Keys) -> np.ndarray:
    """The words of the payload, bound to their hash."""
    try:
        data = base64.b64decode(keys.text("payload").encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error, ValueError) as error:
        raise keys.wrong("payload", f"base64 text ({error})") from error
    if len(data) % 2 or len(data) // 2 > WORDS_LIMIT:
        raise keys.wrong("payload", f"16-bit words, at most {WORDS_LIMIT}")
    if hashlib.sha256(data).hexdigest() != keys.text("payload.sha256"):
        raise keys.wrong("payload.sha256", "the hash of the payload")
    return np.frombuffer(data, "<u2")


def _encodings(kind: str) -> tuple[int, ...]:
    if KINDS[kind].whole:
        return (INTEGER,)
    return (DENSE,) if KINDS[kind].dimension in ("left", "right") else (DENSE, SPARSE)


def _decode(
    keys: _Keys, entry: tuple[int, int, int, int], words: np.ndarray, numbers: Hyperparameters
) -> tuple[str, Any]:
    """One entry as (kind, float32 values)."""
    number, encoding, offset, length = entry
    kind = _KIND_NAMES.get(number)
    if kind is None:
        raise keys.wrong("ent.kind", f"a parameter kind that rondel executes, got {number}")
    allowed = _encodings(kind)
    if encoding not in allowed:
        raise keys.wrong("ent.enc", f"{' or '.join(map(str, allowed))} for {kind}, got {encoding}")
    size, span = kind_size(kind, numbers), length * (2 if encoding == SPARSE else 1)
    ranked = KINDS[kind].dimension in ("left", "right")
    fits = length <= size if encoding == SPARSE else length > 0 and (length % size == 0 if ranked else length == size)
    if length < 0 or not fits:
        raise keys.wrong("ent.len", f"{size} values{' a rank' if ranked else ''} of {kind}, got {length}")
    if not 0 <= offset <= len(words) - span:
        raise keys.wrong("ent.off", f"a place in the payload of {len(words)} words, got {offset} for {span} words")
    data = words[offset : offset + span]
    if encoding == INTEGER:
        return kind, data.view("<i2").astype(np.float32)
    if encoding == DENSE:
        return kind, data.view("<f2").astype(np.float32).reshape(kind_shape(kind, numbers, length // size))
    values = np.full(size, KINDS[kind].identity, np.float32)
    channels = data[0::2]
    if np.any(channels >= size) or np.any(np.diff(channels.astype(np.int64)) <= 0):
        raise keys.wrong("payload", f"rising channels below {size} in a sparse {kind}")
    values[channels] = np.ascontiguousarray(data[1::2]).view("<f2")
    return kind, values


def _sets(keys: _Keys, numbers: Hyperparameters) -> tuple[ParameterSet, ...]:
    first = keys.integers("pset.first", required=False)
    columns = [keys.integers(name, required=False) for name in ENTRY_ARRAYS]
    if len({len(column) for column in columns}) != 1:
        raise keys.wrong("ent.*", "arrays of one length")
    entries = list(zip(*columns, strict=True))
    ends = (first[0], first[-1]) if first else (0, 0)
    if ends != (0, len(entries)) or any(before > after for before, after in pairwise(first)):
        raise keys.wrong("pset.first", f"rising numbers from 0 to {len(entries)}")
    words = _payload(keys)
    sets = []
    for start, end in pairwise(first):
        found: ParameterSet = {}
        for entry in entries[start:end]:
            kind, values = _decode(keys, entry, words, numbers)
            if kind in found:
                raise keys.wrong("ent.kind", f"every kind once in a parameter set, got {kind} twice")
            found[kind] = values
        sets.append(found)
    return tuple(sets)


def _version(keys: _Keys) -> tuple[int, list[str]]:
    """The major version, and warnings about what a newer minor version says beside what rondel knows."""
    version = keys.integers("version")
    if len(version) != 3:
        raise keys.wrong("version", "three numbers")
    known = {*ARRAYS, *SCALARS}
    strange = [name for name in keys.values if name not in known and not name.startswith(EVALUATION)]
    written = ".".join(map(str, version))
    return version[0], [f"{PREFIX}{name} (version {written}) is unknown and ignored" for name in sorted(strange)]


def decode_replication(keys: Mapping[str, Any], numbers: Hyperparameters) -> tuple[Replication | None, list[str]]:
    """The replication in a file's keys, or None where there is none, with warnings for the user.

    A major version that rondel does not know means the base path and a warning, or an error where the file is strict.
    """
    taken = _Keys(keys)
    if not taken.values:
        return None, []
    major, warnings = _version(taken)
    strict = taken.flag("strict")
    if major != VERSION[0]:
        sentence = f"replication of version {major} is unknown, rondel knows {VERSION[0]}"
        if strict:
            raise RondelError(f"{sentence}, and the file says that its base path is not acceptable; update rondel")
        return None, [f"{sentence}: the base path runs"]
    columns = {field: taken.integers(name) for name, field in STEP_FIELDS.items()}
    if len({len(column) for column in columns.values()}) != 1:
        raise taken.wrong("step.*", "arrays of one length")
    steps = tuple(Step(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True))
    found = Replication(
        layers=taken.integer("n_base"),
        steps=steps,
        merges=tuple(taken.integers("group.merge")),
        sets=_sets(taken, numbers),
        layer_sets=tuple(taken.integers("layer.pset", required=False)),
        strict=strict,
        base_sha256=taken.text("base.sha256"),
        evaluation=taken.evaluation(),
    )
    check(found, numbers)
    return found, warnings


def told_replication(keys: Mapping[str, Any]) -> dict[str, Any]:
    """For people: {"replication": the copies by layer, "evaluation": what was measured of them}, each empty without."""
    taken = _Keys(keys)
    try:
        copies = json.loads(taken.text("json") or "{}")
    except ValueError as error:
        raise taken.wrong("json", f"JSON ({error})") from error
    if not isinstance(copies, dict):
        raise taken.wrong("json", "a JSON object")
    return {"replication": copies, "evaluation": taken.evaluation()}
