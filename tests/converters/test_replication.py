"""Replication keys: what is written is read back, and every broken rule or key is refused in one sentence."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rondel.converters.errors import RondelError
from rondel.converters.family import Hyperparameters
from rondel.converters.replication import (
    ATTENTION,
    BLOCK,
    FFN,
    KINDS,
    NO_SLOT,
    Replication,
    Step,
    check,
    kind_size,
    mirror,
)
from rondel.converters.replication_codec import PREFIX, decode_replication, encode_replication
from rondel.converters.replication_keys import replication_keys

NUMBERS = Hyperparameters(
    vocabulary=64,
    context=32,
    width=16,
    layers=3,
    hidden=24,
    heads=4,
    kv_heads=2,
    head_dim=4,
    norm_epsilon=1e-5,
    rope_base=1e4,
    tied=True,
)
GATES = {"gate_attn": np.array([0.5], np.float32), "gate_ffn": np.array([0.25], np.float32)}


def example() -> Replication:
    """Layer 0 once, layer 1 as a parallel pair with shared keys, layer 2 with a serial copy of its FFN."""
    return Replication(
        layers=3,
        steps=(
            Step(0, 0, 0, 0),
            Step(1, 0, 1, 1),
            Step(1, 1, 1, 1, BLOCK, 1),
            Step(2, 0, 2, 2),
            Step(2, 1, 3, NO_SLOT, FFN, 2),
        ),
        merges=(0, 2, 0, 0),
        sets=(GATES, {"gate_ffn": GATES["gate_ffn"], "ffn_out_gain": np.arange(16, dtype=np.float32) / 8}),
        base_sha256="ab" * 32,
        evaluation={"nll_base": 2.5, "n_tokens": 4096, "regression": False},
    )


def keys_of(found: Replication) -> dict[str, Any]:
    return json.loads(json.dumps(encode_replication(found, NUMBERS)))


def same(a: Replication, b: Replication) -> bool:
    sets_agree = len(a.sets) == len(b.sets) and all(
        one.keys() == other.keys() and all(np.array_equal(one[kind], other[kind]) for kind in one)
        for one, other in zip(a.sets, b.sets, strict=True)
    )
    return replace(a, sets=()) == replace(b, sets=()) and sets_agree


@st.composite
def parameter_sets(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Float16 values; some vectors are mostly identity, so that both encodings occur."""
    found = {}
    for kind in ("gate_attn", "gate_ffn", *draw(st.lists(st.sampled_from(sorted(KINDS)), unique=True))):
        size = kind_size(kind, NUMBERS)
        values = np.full(size, KINDS[kind][2], np.float32)
        for channel in draw(st.lists(st.integers(0, size - 1), max_size=size)):
            values[channel] = draw(st.floats(width=16, allow_nan=False, allow_infinity=False))
        found[kind] = values
    return found


@st.composite
def replications(draw: st.DrawFn) -> Replication:
    sets = draw(st.lists(parameter_sets(), min_size=1, max_size=3))
    steps: list[Step] = []
    merges: list[int] = []
    slots = 0
    for layer in range(NUMBERS.layers):
        base = Step(layer, 0, len(merges), slots)
        steps.append(base)
        merges.append(0)
        slots += 1
        for number in range(1, 1 + draw(st.integers(0, 3))):
            together = merges[-1] != 0 or number == 1
            if together and draw(st.booleans()):
                merges[base.group] = merges[base.group] or draw(st.integers(1, 3))
            else:
                merges.append(0)
            parts = draw(st.sampled_from([ATTENTION, FFN, BLOCK]))
            own = draw(st.booleans())
            slot = NO_SLOT if parts == FFN else slots if own else base.slot
            slots += slot == slots
            steps.append(Step(layer, number, len(merges) - 1, slot, parts, draw(st.integers(1, len(sets)))))
    layer_sets = draw(st.lists(st.integers(0, len(sets)), min_size=3, max_size=3) | st.just([]))
    return Replication(3, tuple(steps), tuple(merges), tuple(sets), tuple(layer_sets), draw(st.booleans()))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(replications())
def test_what_is_written_is_read_back(found: Replication) -> None:
    keys = keys_of(found)
    read, warnings = decode_replication(keys, NUMBERS)
    assert read is not None
    assert same(read, found)
    assert warnings == []
    typed, _ = decode_replication(replication_keys(keys), NUMBERS)  # as the arrays of a GGUF file
    assert typed is not None
    assert same(typed, found)
    assert encode_replication(read, NUMBERS) == encode_replication(found, NUMBERS)


def test_float16_rounds_once() -> None:
    found = replace(
        example(), sets=({"gate_attn": np.array([0.1], np.float32), **example().sets[1]}, example().sets[1])
    )
    read, _ = decode_replication(keys_of(found), NUMBERS)
    assert read is not None
    assert read.sets[0]["gate_attn"][0] == np.float32(np.float16(0.1))


def test_sparse_is_chosen_where_it_is_shorter() -> None:
    gain = np.ones(16, np.float32)
    gain[3], gain[9] = 2, 0.5
    found = replace(example(), sets=(GATES, {"gate_ffn": GATES["gate_ffn"], "ffn_out_gain": gain}))
    keys = keys_of(found)
    assert keys[PREFIX + "ent.enc"] == [0, 0, 0, 1]
    assert keys[PREFIX + "ent.len"] == [1, 1, 1, 2]
    words = np.frombuffer(base64.b64decode(keys[PREFIX + "payload"]), "<u2")
    assert words[3:].tolist() == [3, 0x4000, 9, 0x3800]
    read, _ = decode_replication(keys, NUMBERS)
    assert read is not None
    assert same(read, found)


def test_the_mirror_counts_additional_executions() -> None:
    assert json.loads(mirror(example())) == {
        "layer_1": {"type": "parallel", "copies": 1, "shared_weight": True, "merge_strategy": "mean"},
        "layer_2": {"type": "serial", "copies": 1, "shared_weight": True},
    }


def test_copies_inherit_from_their_layer_and_the_base_path_does_not() -> None:
    layer = {"gate_attn": np.array([9.0], np.float32), "ffn_norm_gain": np.full(16, 3, np.float32)}
    found = replace(example(), sets=(*example().sets, layer), layer_sets=(0, 3, 0))
    check(found, NUMBERS)
    base, copy = found.steps[1], found.steps[2]
    assert found.parameters(base) == {}
    assert found.parameters(copy)["gate_attn"][0] == 0.5
    assert found.parameters(copy)["ffn_norm_gain"][0] == 3


def test_no_keys_are_no_replication() -> None:
    assert decode_replication({"qwen3.block_count": 3}, NUMBERS) == (None, [])


def test_versions() -> None:
    keys = keys_of(example())
    newer = keys | {PREFIX + "version": [1, 7, 0], PREFIX + "step.when": [0, 0, 0, 0, 0], PREFIX + "note": "x"}
    read, warnings = decode_replication(newer, NUMBERS)
    assert read is not None
    assert same(read, example())
    assert warnings == [f"{PREFIX}{name} (version 1.7.0) is unknown and ignored" for name in ("note", "step.when")]
    read, warnings = decode_replication(keys | {PREFIX + "version": [2, 0, 0]}, NUMBERS)
    assert read is None
    assert warnings == ["replication of version 2 is unknown, rondel knows 1: the base path runs"]
    with pytest.raises(RondelError, match="base path is not acceptable"):
        decode_replication(keys | {PREFIX + "version": [2, 0, 0], PREFIX + "strict": True}, NUMBERS)


def payload(words: list[int]) -> dict[str, str]:
    data = np.array(words, "<u2").tobytes()
    return {"payload": base64.b64encode(data).decode(), "payload.sha256": hashlib.sha256(data).hexdigest()}


BAD_KEYS: list[tuple[dict[str, Any], str]] = [
    ({"version": [1, 0]}, "version: expected three numbers"),
    ({"version": None}, "version"),
    ({"strict": 1}, "strict: expected true or false"),
    ({"n_base": 4}, "n_base is 4, the model has 3"),
    ({"n_base": "3"}, "n_base: expected an integer"),
    ({"n_base": None}, "n_base"),
    ({"step.layer": [0, 1, 1, 2]}, r"step\.\*: expected arrays of one length"),
    ({"step.layer": [0, 1, 1, 2, 3]}, "step 4 runs layer 3"),
    ({"step.layer": [0, 2, 2, 1, 1]}, "pass 0 must be the whole layers 0 to 2"),
    ({"step.layer": [0, 1, 1, 2, 1]}, "step 4 is pass 1 of layer 1, expected 2"),
    ({"step.layer": 3}, r"step\.layer: expected an array of integers"),
    ({"step.layer": [0, 1, 1, 2.5, 2]}, r"step\.layer: expected an array of integers"),
    ({"step.layer": None}, r"step\.layer"),
    ({"step.pass": [0, 0, 1, 0, 256]}, "pass 256"),
    ({"step.pass": [0, 0, 1, 0, 2]}, "step 4 is pass 2 of layer 2, expected 1"),
    ({"step.pass": [0, 0, 0, 0, 0]}, "pass 0 must be"),
    ({"step.parts": [3, 3, 3, 1, 2]}, "pass 0 must be"),
    ({"step.parts": [3, 3, 3, 3, 4]}, "step 4 has the parts 4"),
    ({"step.parts": [3, 3, 3, 3, 0]}, "step 4 has the parts 0"),
    ({"step.group": [0, 1, 1, 2, 1]}, "contiguous"),
    ({"step.group": [1, 2, 2, 3, 4]}, "contiguous"),
    ({"step.group": [0, 1, 2, 3, 4]}, r"group\.merge has 4 elements, expected 5"),
    ({"step.kv": [0, 1, 1, 2, 3]}, "no attention and the KV slot 3"),
    ({"step.kv": [0, 1, 3, 2, -1]}, "step 2 has the KV slot 3, expected the new slot 2"),
    ({"step.kv": [0, 0, 0, 1, -1]}, "step 1 has the KV slot 0"),
    ({"step.kv": [0, 1, 0, 2, -1]}, "step 2 has the KV slot 0"),
    ({"step.kv": [0, 1, -1, 2, -1]}, "step 2 has the KV slot -1"),
    ({"step.pset": [0, 0, 3, 0, 2]}, "beyond the last, 2"),
    ({"step.pset": [0, 1, 1, 0, 2]}, "pass 0 has parameters"),
    ({"step.pset": [0, 0, 0, 0, 2]}, r"step 2 \(pass 1 of layer 1\) has no gate_attn"),
    ({"step.pset": [0, 0, 2, 0, 2]}, "has no gate_attn"),
    ({"group.merge": [0, 0, 0, 0]}, "group 1 has 2 steps and the merge none"),
    ({"group.merge": [1, 2, 0, 0]}, "group 0 has 1 steps and the merge sum"),
    ({"group.merge": [0, 4, 0, 0]}, r"group\.merge holds a number beyond 3"),
    ({"layer.pset": [0, 0]}, r"layer\.pset has 2 elements"),
    ({"layer.pset": [0, 0, 9]}, "beyond the last"),
    ({"pset.first": [0, 2]}, r"pset\.first: expected rising"),
    ({"pset.first": [0, 3, 2, 4]}, r"pset\.first"),
    ({"pset.first": [1, 2, 4]}, r"pset\.first"),
    ({"pset.first": None}, r"pset\.first"),
    ({"ent.kind": [1, 2, 2, 17]}, "a parameter kind that rondel executes.*17"),
    ({"ent.kind": [1, 1, 2, 6]}, "gate_attn twice"),
    ({"ent.kind": [1, 2, 2]}, r"ent\.\*"),
    ({"ent.kind": [1, 2, 2, 9]}, "4 values of q_head_gain, got 16"),
    ({"ent.enc": [0, 0, 0, 2]}, r"ent\.enc: expected 0 or 1, got 2"),
    ({"ent.off": [0, 1, 2, 4]}, r"ent\.off"),
    ({"ent.off": [0, 1, 2, -1]}, r"ent\.off"),
    ({"ent.off": [0, 1, 2, 1 << 62]}, r"ent\.off"),
    ({"ent.len": [1, 1, 1, 15]}, r"ent\.len: expected 16 values of ffn_out_gain, got 15"),
    ({"ent.len": [1, 1, 1, -16]}, r"ent\.len"),
    ({"payload": "AAA"}, "payload: expected base64"),
    ({"payload": "é"}, "payload: expected base64"),
    ({"payload": "AA=="}, "payload: expected 16-bit words"),
    ({"payload": "AAAA" * 12 + "AAA="}, r"payload\.sha256: expected the hash"),
    ({"payload": None}, r"payload\.sha256"),
    (payload([0x7C00, *[0] * 18]), "no float16 number"),
    (payload([0x7E00, *[0] * 18]), "no float16 number"),
    ({"base.sha256": 7}, r"base\.sha256: expected a string"),
]


@pytest.mark.parametrize(("changes", "sentence"), BAD_KEYS, ids=range(len(BAD_KEYS)))
def test_a_key_that_breaks_a_rule_is_refused(changes: dict[str, Any], sentence: str) -> None:
    keys = keys_of(example()) | {PREFIX + name: value for name, value in changes.items()}
    keys = {name: value for name, value in keys.items() if value is not None}
    with pytest.raises(RondelError, match=sentence) as refusal:
        decode_replication(keys, NUMBERS)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("pairs", [[16, 0], [3, 0, 3, 0], [9, 0, 3, 0]])
def test_sparse_channels_must_rise_and_exist(pairs: list[int]) -> None:
    keys = keys_of(example())
    changes = {"ent.enc": [0, 0, 0, 1], "ent.len": [1, 1, 1, len(pairs) // 2], **payload([0, 0, 0, *pairs])}
    with pytest.raises(RondelError, match="rising channels below 16"):
        decode_replication(keys | {PREFIX + name: value for name, value in changes.items()}, NUMBERS)


@pytest.mark.parametrize(
    "broken",
    [
        lambda r: replace(r, layers=4),
        lambda r: replace(r, steps=r.steps[:2]),
        lambda r: replace(r, sets=({"gate_attn": np.ones(2, np.float32)}, r.sets[1])),
        lambda r: replace(r, sets=({"gate": np.ones(1, np.float32)}, r.sets[1])),
        lambda r: replace(r, sets=({**GATES, "attn_out_bias": np.full(16, 7e4, np.float32)}, r.sets[1])),
    ],
)
def test_a_broken_record_is_not_written(broken: Callable[[Replication], Replication]) -> None:
    with pytest.raises(RondelError, match=r"^replication: "):
        encode_replication(broken(example()), NUMBERS)
