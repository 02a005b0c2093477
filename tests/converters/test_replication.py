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
from rondel.converters.hyperparameters import Hyperparameters
from rondel.converters.replication import (
    ATTENTION,
    BLOCK,
    FFN,
    NO_SLOT,
    ParameterSet,
    Replication,
    Step,
    check,
    mirror,
)
from rondel.converters.replication_codec import PREFIX, decode_replication, encode_replication
from rondel.converters.replication_keys import replication_keys
from rondel.converters.replication_kinds import (
    ACTIVATION_KINDS,
    KINDS,
    LOW_RANK,
    WHOLE_RANGES,
    kind_shape,
    kind_size,
    shares_keys,
)

VECTORS = [kind for kind in KINDS if KINDS[kind].number <= 10]
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


HALVES = st.floats(width=16, allow_nan=False, allow_infinity=False)


@st.composite
def parameter_sets(draw: st.DrawFn) -> ParameterSet:
    """Float16 values; some vectors are mostly identity, so that every encoding occurs."""
    found = {}
    for kind in ("gate_attn", "gate_ffn", *draw(st.lists(st.sampled_from(sorted(VECTORS)), unique=True))):
        size = kind_size(kind, NUMBERS)
        values = np.full(size, KINDS[kind].identity, np.float32)
        for channel in draw(st.lists(st.integers(0, size - 1), max_size=size)):
            values[channel] = draw(HALVES)
        found[kind] = values
    for kind in draw(st.lists(st.sampled_from(sorted(ACTIVATION_KINDS)), unique=True)):
        whole = WHOLE_RANGES.get(kind)
        value = draw(st.integers(*whole) if whole else HALVES.filter(lambda half: half > 0))
        found[kind] = np.array([value], np.float32)
    for role in draw(st.lists(st.sampled_from(sorted(LOW_RANK)), unique=True, max_size=2)):
        rank = draw(st.integers(1, 3))
        for half in ("left", "right"):
            shape = kind_shape(f"{role}_{half}", NUMBERS, rank)
            found[f"{role}_{half}"] = np.full(shape, draw(HALVES), np.float32)
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
            parameters = draw(st.integers(1, len(sets)))
            own = draw(st.booleans()) or not shares_keys(sets[parameters - 1])
            slot = NO_SLOT if parts == FFN else slots if own else base.slot
            slots += slot == slots
            steps.append(Step(layer, number, len(merges) - 1, slot, parts, parameters))
    plain = [0, *(i for i, values in enumerate(sets, start=1) if values.keys() <= set(VECTORS) - {"attn_norm_gain"})]
    layer_sets = draw(st.lists(st.sampled_from(plain), min_size=3, max_size=3) | st.just([]))
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
    ({"ent.kind": [1, 2, 2, 21]}, "a parameter kind that rondel executes.*21"),
    ({"ent.kind": [1, 1, 2, 6]}, "gate_attn twice"),
    ({"ent.kind": [1, 2, 2]}, r"ent\.\*"),
    ({"ent.kind": [1, 2, 2, 9]}, "4 values of q_head_gain, got 16"),
    ({"ent.enc": [0, 0, 0, 2]}, r"ent\.enc: expected 0 or 1 for ffn_out_gain, got 2"),
    ({"ent.kind": [1, 2, 2, 18]}, r"ent\.enc: expected 2 for act_bits, got 0"),
    ({"ent.kind": [1, 2, 2, 18], "ent.enc": [0, 0, 0, 2]}, r"ent\.len: expected 1 values of act_bits, got 16"),
    ({"ent.kind": [1, 2, 2, 38], "ent.enc": [0, 0, 0, 1]}, r"ent\.enc: expected 0 for attn_output_left"),
    ({"ent.kind": [1, 2, 2, 42]}, r"ent\.len: expected 24 values a rank of ffn_up_left, got 16"),
    ({"ent.kind": [1, 2, 2, 38], "ent.len": [1, 1, 1, 0]}, r"ent\.len: expected 16 values a rank"),
    ({"ent.kind": [1, 2, 2, 38]}, "step 4 has one half of the low-rank term of attn_output"),
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
    ({"eval.kl_base": 1}, r"eval\.kl_base: expected a float32 number"),
    ({"eval.ci_lo": "low"}, r"eval\.ci_lo: expected a float32 number"),
    ({"eval.rival_low_rank": True}, r"eval\.rival_low_rank: expected a float32 number"),
    ({"eval.n_tokens": 4096.0}, r"eval\.n_tokens: expected an unsigned integer"),
    ({"eval.n_ctx": -1}, r"eval\.n_ctx: expected an unsigned integer"),
    ({"eval.n_ctx": True}, r"eval\.n_ctx: expected an unsigned integer"),
    ({"eval.corpus_sha256": [1]}, r"eval\.corpus_sha256: expected a string"),
    ({"eval.regression": 0}, r"eval\.regression: expected true or false"),
]


def test_what_a_newer_version_measured_is_kept() -> None:
    keys = keys_of(example()) | {f"{PREFIX}eval.accuracy": 0.5, f"{PREFIX}eval.rival_low_rank": np.float32(0.25)}
    found, _ = decode_replication(keys, NUMBERS)
    assert found is not None
    assert found.evaluation["accuracy"] == 0.5
    assert found.evaluation["rival_low_rank"] == 0.25


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


def with_values(**values: float | np.ndarray) -> Replication:
    """The example with more parameters for the parallel copy of layer 1, which shares its keys."""
    return replace(example(), sets=({**GATES, **{k: np.atleast_1d(v) for k, v in values.items()}}, example().sets[1]))


def own_slot(found: Replication) -> Replication:
    """The example with a KV slot for the copy of layer 1."""
    base, first, copy, last, ffn = found.steps
    return replace(found, steps=(base, first, replace(copy, slot=2), replace(last, slot=3), ffn))


RANK_TWO = {"ffn_up_left": np.ones((24, 2), np.float32), "ffn_up_right": np.ones((2, 16), np.float32)}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"act_bits": 1}, "act_bits of parameter set 1 is 1, expected a whole number 2 to 16"),
        ({"act_bits": 17}, "2 to 16"),
        ({"act_bits": 7.5}, "whole number 2 to 16"),
        ({"rounding": -1}, "whole number 0 to 32767"),
        ({"rotation_seed": 32768}, "whole number 0 to 32767"),
        ({"act_scale": 0.0}, "act_scale of parameter set 1 is 0.0, expected a float16 number above 0"),
        ({"act_clip": 1e-9}, "above 0"),
        ({"ffn_up_left": RANK_TWO["ffn_up_left"]}, "one half of the low-rank term of ffn_up"),
        (RANK_TWO | {"ffn_up_right": np.ones((3, 16))}, "ranks 2 and 3 in the low-rank term of ffn_up"),
        (RANK_TWO | {"ffn_up_left": np.ones((16, 2))}, "ffn_up_left of parameter set 1 has 32 values, expected 24 x 2"),
        (RANK_TWO | {"ffn_up_left": np.ones(48)}, "48 values, expected 24 x 1"),
        (RANK_TWO | {"ffn_up_left": np.ones((24, 17))}, "the rank 17, at most 16 is useful"),
        (RANK_TWO | {"ffn_up_left": np.ones((24, 0))}, "0 values, expected 24 x 1"),
    ],
)
def test_values_out_of_range_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RondelError, match=sentence):
        check(own_slot(with_values(**values)), NUMBERS)


@pytest.mark.parametrize(
    "values",
    [
        {"attn_norm_gain": np.full(16, 1.5)},
        {"act_scale": 1.0},
        {"act_bits": 16},
        {"attn_k_left": np.ones((8, 1)), "attn_k_right": np.ones((1, 16))},
    ],
)
def test_a_parallel_copy_with_other_keys_needs_a_slot_of_its_own(values: dict[str, Any]) -> None:
    with pytest.raises(RondelError, match=r"step 2 reads the keys and values of KV slot 1.*slot of its own"):
        check(with_values(**values), NUMBERS)
    check(own_slot(with_values(**values)), NUMBERS)
    assert not shares_keys(with_values(**values).sets[0])


def test_a_parallel_copy_may_share_keys_that_it_would_have_made() -> None:
    values = {"attn_norm_gain": np.ones(16), "q_head_gain": np.full(4, 2.0), "ffn_norm_gain": np.full(16, 2.0)}
    check(with_values(**values), NUMBERS)
    assert shares_keys(with_values(**values).sets[0])
    gained = replace(own_slot(with_values(attn_norm_gain=np.full(16, 2.0))), merges=(0, 2, 0, 0))
    third = Step(1, 2, 1, 2, BLOCK, 1)  # reads what the second member, which has the same gains, made
    check(replace(gained, steps=(*gained.steps[:3], third, *gained.steps[3:])), NUMBERS)


def test_a_serial_copy_may_attend_to_earlier_keys_but_not_adapt_them() -> None:
    steps = (Step(0, 0, 0, 0), Step(1, 0, 1, 1), Step(1, 1, 2, 1, BLOCK, 1), Step(2, 0, 3, 2))
    found = replace(with_values(attn_norm_gain=np.full(16, 2.0)), steps=steps, merges=(0, 0, 0, 0))
    check(found, NUMBERS)
    adapter = {"attn_v_left": np.ones((8, 1), np.float32), "attn_v_right": np.ones((1, 16), np.float32)}
    with pytest.raises(RondelError, match="without its attn_v"):
        check(replace(found, sets=({**GATES, **adapter}, found.sets[1])), NUMBERS)


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
