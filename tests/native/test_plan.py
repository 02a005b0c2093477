"""Replication: the executed plan against float64 and real layers, and everything a plan may get wrong.

What has to hold of replication, and the tests of it:
- closed gates are bit-equal to the base: test_closed_gates_leave_no_trace, ..._in_a_wide_group; in unmodified
  llama.cpp: converters/test_materialize.py, test_llama_cpp_runs_closed_copies_like_the_base_model;
- linear parallel copies fold: test_parallel_copies_without_parameters_fold;
- the runtime, the float64 reference and real layers in llama.cpp agree, for a prompt and token by token, with keys and
  values shared and own: quant/test_replication_reference.py; without torch: test_plans_are_those_of_float64,
  test_serial_copies_equal_real_layers;
- a file is read as it was written, newer minor and major versions: converters/test_replication.py,
  test_what_is_written_is_read_back, test_versions, test_what_a_newer_version_measured_is_kept; here
  test_unknown_minor_keys_are_ignored, test_an_unknown_major_version_...;
- the base path is unharmed: test_without_replication_the_base_path_runs,
  test_a_wrong_plan_refuses_but_leaves_the_base_path; in llama.cpp: quant/test_replication_reference.py;
- parallel copies read no more bytes a token: test_parallel_copies_read_the_weights_once, and cli/test_stages.py,
  test_bench_reads_no_more_with_parallel_copies;
- nothing hostile is worse than an error: test_a_wrong_plan_refuses_but_leaves_the_base_path, and `make fuzz` on the
  file of test_the_file_of_the_fuzzer_runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from rondel.native import Model, NativeError, Session
from tests.native.reference import (
    ATTENTION,
    BLOCK,
    FFN,
    MEAN,
    NONE,
    SUM,
    WEIGHTED_SUM,
    Numbers,
    Step,
    forward,
    number_steps,
    random_weights,
    replication_keys,
    write_everything,
    write_gguf,
)

LARGEST_ERROR = 1e-5  # float32 against float64, see test_session.py
TOKENS = [3, 17, 5, 59, 0, 3, 41, 22, 8, 13]
NUMBERS = Numbers()
TYPES = gguf.GGUFValueType
OPEN = {"gate_attn": np.float32(1), "gate_ffn": np.float32(1)}
CLOSED = {"gate_attn": np.float32(0), "gate_ffn": np.float32(0)}


def gains(seed: int = 1) -> dict[str, Any]:
    """Every kind of parameter that the runtime executes."""
    generator = np.random.default_rng(seed)
    sizes = {"attn_norm_gain": 32, "ffn_norm_gain": 32, "attn_out_gain": 32, "ffn_out_gain": 32, "q_head_gain": 4}
    values: dict[str, Any] = {name: 1 + 0.3 * generator.standard_normal(size) for name, size in sizes.items()}
    values["hidden_gain"] = 1 + 0.3 * generator.standard_normal(48)
    values["attn_out_bias"] = 0.3 * generator.standard_normal(32)
    values["ffn_out_bias"] = 0.3 * generator.standard_normal(32)
    return values | {"gate_attn": np.float32(0.5), "gate_ffn": np.float32(0.25)}


SIZES = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "output": (32, 32)}  # rows, channels; of attention
SIZES = {f"attn_{role}": size for role, size in SIZES.items()}
SIZES |= {"ffn_gate": (48, 32), "ffn_up": (48, 32), "ffn_down": (32, 48)}


def low_rank(rank: int, seed: int = 4) -> dict[str, Any]:
    """A term beside every linear, about as large as the linear."""
    generator = np.random.default_rng(seed)
    found: dict[str, Any] = {}
    for role, (rows, channels) in SIZES.items():
        found[f"{role}_left"] = generator.standard_normal((rows, rank)) / rank**0.5
        found[f"{role}_right"] = generator.standard_normal((rank, channels)) / channels**0.5
    return found


ROUNDED = {"act_bits": 4, "act_scale": 1.25, "act_clip": 0.75}
DITHERED = {"act_bits": 4, "rounding": 77, "rotation_seed": 5}


def serial(copy: dict[str, Any], parts: int = BLOCK) -> tuple[list[Step], list[int]]:
    steps = number_steps([Step(0), Step(1), Step(1, 1, parts, parameters=copy), Step(2)])
    return steps, [NONE] * 4


def parallel(copy: dict[str, Any], merge: int, first: dict[str, Any] | None = None) -> tuple[list[Step], list[int]]:
    steps = [Step(0), Step(1, 0, BLOCK, 1, 1, first or {}), Step(1, 1, BLOCK, 1, 2, copy), Step(2, group=2, kv=3)]
    return steps, [NONE, merge, NONE]


def evaluate(path: Path, replication: bool = True, batch: int = 512, threads: int = 1) -> np.ndarray:
    with Model(path) as model, Session(model, threads=threads, batch=batch, replication=replication) as session:
        return session.eval(TOKENS, all=True)


def write(tmp_path: Path, steps: list[Step], merges: list[int], **changes: Any) -> Path:
    keys = replication_keys(NUMBERS.layers, steps, merges)
    for name, value in changes.items():
        key = "rondel.replication." + name.replace("__", ".")
        if value is None:
            del keys[key]
        elif isinstance(value, tuple):
            keys[key] = value
        else:
            keys[key] = (value, *keys[key][1:])
    return write_gguf(tmp_path / "replicated.gguf", NUMBERS, random_weights(NUMBERS), keys)


def base(tmp_path: Path) -> np.ndarray:
    return evaluate(write_gguf(tmp_path / "base.gguf", NUMBERS, random_weights(NUMBERS)))


PLANS = {
    "serial": serial(gains()),
    "serial-attention": serial(gains(), ATTENTION),
    "parallel-sum": parallel(gains(), SUM),
    "parallel-mean": parallel(gains(), MEAN, {"gate_attn": np.float32(0.75)}),
    "parallel-weighted": parallel(gains(), WEIGHTED_SUM, OPEN | {"ffn_out_gain": np.full(32, 1.25)}),
    "serial-ffn-without-cache": (
        [Step(0), Step(0, 1, FFN, 1, -1, gains()), Step(1, group=2, kv=1), Step(2, group=3, kv=2)],
        [NONE] * 4,
    ),
    "shared-cache": (
        [Step(0), Step(1, group=1, kv=1), Step(1, 1, BLOCK, 2, 1, gains()), Step(2, group=3, kv=2)],
        [NONE] * 4,
    ),
    "three-in-parallel": (
        [
            Step(0),
            Step(0, 1, group=0, kv=1, parameters=gains(2)),
            Step(0, 2, group=0, kv=2, parameters=gains(3)),
            Step(1, group=1, kv=3),
            Step(2, group=2, kv=4),
        ],
        [MEAN, NONE, NONE],
    ),
}

PLANS |= {
    "shared-and-own-caches-in-parallel": (
        [
            Step(0),
            Step(1, group=1, kv=1),
            Step(1, 1, group=1, kv=1, parameters=gains(2)),
            Step(1, 2, group=1, kv=2, parameters=gains(3)),
            Step(2, group=2, kv=3),
        ],
        [NONE, SUM, NONE],
    ),
    "parts-in-parallel": (
        [
            Step(0),
            Step(1, group=1, kv=1),
            Step(1, 1, FFN, 1, -1, gains(2)),
            Step(1, 2, ATTENTION, 1, 2, gains(3)),
            Step(2, group=2, kv=3),
        ],
        [NONE, SUM, NONE],
    ),
    "layers-in-parallel": (
        [
            Step(0),
            Step(1, kv=1),
            Step(0, 1, kv=0, parameters=gains(2)),
            Step(1, 1, kv=2, parameters=gains(3)),
            Step(2, group=1, kv=3),
        ],
        [MEAN, NONE],
    ),
    "low-rank": serial(gains() | low_rank(3)),
    "low-rank-in-parallel": parallel(gains() | low_rank(5), SUM),
    "rounded-activations": serial(OPEN | ROUNDED),
    "dithered-and-turned-activations": serial(gains() | DITHERED),
    "everything-in-parallel": (
        [
            Step(0),
            Step(1, group=1, kv=1),
            Step(1, 1, group=1, kv=2, parameters=gains(2) | ROUNDED | low_rank(1)),
            Step(1, 2, group=1, kv=1, parameters=gains(3)),
            Step(1, 3, group=1, kv=3, parameters=gains(4) | DITHERED | low_rank(7, seed=9)),
            Step(2, group=2, kv=4),
        ],
        [NONE, SUM, NONE],
    ),
    "copies-in-parallel-after-their-layer": (
        [
            Step(0),
            Step(1, group=1, kv=1),
            Step(2, group=2, kv=2),
            Step(1, 1, group=3, kv=3, parameters=gains(2)),
            Step(1, 2, group=3, kv=3, parameters=gains(3)),
        ],
        [NONE, NONE, NONE, WEIGHTED_SUM],
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_are_those_of_float64(name: str, tmp_path: Path) -> None:
    steps, merges = PLANS[name]
    expected = forward(NUMBERS, random_weights(NUMBERS), TOKENS, steps, merges)
    path = write(tmp_path, steps, merges)
    got = evaluate(path)
    assert np.abs(got - expected).max() < LARGEST_ERROR * np.abs(expected).max()
    assert np.abs(got - base(tmp_path)).max() > 1e-2 * np.abs(expected).max()  # the plan does something
    assert np.array_equal(evaluate(path, batch=1), got)
    assert np.array_equal(evaluate(path, threads=3, batch=4), got)
    with Model(path) as model:
        assert (model.steps(), model.steps(replication=False)) == (len(steps), NUMBERS.layers)


@pytest.mark.parametrize("plan", [serial(gains()), parallel(gains(), MEAN)])
def test_without_replication_the_base_path_runs(plan: tuple[list[Step], list[int]], tmp_path: Path) -> None:
    assert np.array_equal(evaluate(write(tmp_path, *plan), replication=False), base(tmp_path))


@pytest.mark.parametrize("plan", [serial(gains() | CLOSED), parallel(gains() | CLOSED, SUM)])
def test_closed_gates_leave_no_trace(plan: tuple[list[Step], list[int]], tmp_path: Path) -> None:
    assert np.array_equal(evaluate(write(tmp_path, *plan)), base(tmp_path))


def group_of(copies: list[dict[str, Any]], merge: int, parts: int = BLOCK) -> tuple[list[Step], list[int]]:
    """Layer 1 with parallel copies that share its keys and values."""
    members = [Step(1, number, parts, 1, 1 if parts & ATTENTION else -1, c) for number, c in enumerate(copies, start=1)]
    return [Step(0), Step(1, group=1, kv=1), *members, Step(2, group=2, kv=2)], [NONE, merge, NONE]


@pytest.mark.parametrize("copies", [1, 3, 11])  # 11: more than fit beside a full batch
def test_closed_gates_leave_no_trace_in_a_wide_group(copies: int, tmp_path: Path) -> None:
    plan = group_of([gains(i) | CLOSED for i in range(copies)], SUM)
    assert np.array_equal(evaluate(write(tmp_path, *plan)), base(tmp_path))
    assert np.array_equal(evaluate(write(tmp_path, *plan), batch=3, threads=2), base(tmp_path))


def test_parallel_copies_without_parameters_fold(tmp_path: Path) -> None:
    expected = base(tmp_path)
    mean = evaluate(write(tmp_path, *group_of([OPEN] * 3, MEAN)))
    assert np.abs(mean - expected).max() < LARGEST_ERROR * np.abs(expected).max()
    gates = [{"gate_attn": np.float32(gate)} for gate in (0.25, 0.5, 0.75)]
    two = evaluate(write(tmp_path, *group_of(gates[:2], SUM, ATTENTION)))
    one = evaluate(write(tmp_path, *group_of(gates[2:], SUM, ATTENTION)))
    assert np.abs(two - one).max() < LARGEST_ERROR * np.abs(one).max()
    assert np.abs(one - expected).max() > 1e-2 * np.abs(expected).max()


def bytes_read(path: Path, batch: int = 512) -> list[int]:
    """Bytes of a prompt and of one token after it."""
    with Model(path) as model, Session(model, threads=1, batch=batch) as session:
        session.eval(TOKENS)
        prompt = session.bytes_read
        session.eval(TOKENS[:1])
        return [prompt, session.bytes_read]


def test_parallel_copies_read_the_weights_once(tmp_path: Path) -> None:
    read = [bytes_read(write(tmp_path, *group_of([gains(i) for i in range(copies)], SUM))) for copies in (1, 2, 7)]
    alone = bytes_read(write_gguf(tmp_path / "base.gguf", NUMBERS, random_weights(NUMBERS)))
    assert read == [alone] * 3
    own = bytes_read(write(tmp_path, *parallel(gains(), SUM)))
    cached = 2 * 4 * NUMBERS.kv_heads * NUMBERS.head_dim  # of a position: float32 keys and values
    assert own == [alone[0] + cached * len(TOKENS), alone[1] + cached * (len(TOKENS) + 1)]
    layer = sum(tensor.nbytes for name, tensor in random_weights(NUMBERS).items() if name.startswith("blk.1."))
    assert bytes_read(write(tmp_path, *serial(gains())))[1] == own[1] + layer


def test_the_file_of_the_fuzzer_runs(tmp_path: Path) -> None:
    """It reaches the plan: a file that is refused would find nothing."""
    with Model(write_everything(tmp_path / "everything.gguf")) as model:
        assert (model.steps(), model.steps(replication=False)) == (5, 2)
        logits = []
        for replication in (True, False):
            with Session(model, threads=1, replication=replication) as session:
                logits.append(session.eval(TOKENS[:4]))
    assert np.isfinite(logits).all()
    assert not np.array_equal(*logits)


def test_low_rank_terms_are_read_by_each_copy(tmp_path: Path) -> None:
    alone = bytes_read(write(tmp_path, *parallel(gains(), SUM)))[1]
    term = sum(4 * 3 * (rows + channels) for rows, channels in SIZES.values())
    assert bytes_read(write(tmp_path, *parallel(gains() | low_rank(3), SUM)))[1] == alone + term


def test_a_slot_read_by_a_later_group_counts_once(tmp_path: Path) -> None:
    plan = PLANS["copies-in-parallel-after-their-layer"]
    one = [Step(1, 1, group=3, kv=3, parameters=gains(2))]
    assert bytes_read(write(tmp_path, *plan)) == bytes_read(write(tmp_path, plan[0][:3] + one, [NONE] * 4))


def test_serial_copies_equal_real_layers(tmp_path: Path) -> None:
    weights = random_weights(NUMBERS)
    copied = {name: tensor for name, tensor in weights.items() if not name.startswith("blk.")}
    for to, layer in enumerate([0, 1, 1, 2]):
        for name, tensor in weights.items():
            if name.startswith(f"blk.{layer}."):
                copied[name.replace(f"blk.{layer}.", f"blk.{to}.")] = tensor
    real = write_gguf(tmp_path / "real.gguf", Numbers(layers=4), copied)
    assert np.array_equal(evaluate(write(tmp_path, *serial(OPEN))), evaluate(real))


def test_sparse_entries_keep_the_identity_elsewhere(tmp_path: Path) -> None:
    gain = np.ones(32)
    gain[[3, 30]] = [0.5, 2]
    dense = evaluate(write(tmp_path, *serial(OPEN | {"ffn_out_gain": gain})))
    steps, merges = serial(OPEN | {"ffn_out_gain": np.zeros(4)})
    keys = replication_keys(NUMBERS.layers, steps, merges)
    import base64

    payload = np.array([1, 1], "<f2").tobytes()
    payload += b"".join(np.uint16(i).tobytes() + np.float16(v).tobytes() for i, v in ((3, 0.5), (30, 2)))
    changes = {"ent__enc": [0, 0, 1], "ent__len": [1, 1, 2], "payload": base64.b64encode(payload).decode()}
    assert "rondel.replication.ent.enc" in keys
    assert np.array_equal(evaluate(write(tmp_path, steps, merges, **changes)), dense)


def test_copies_inherit_from_their_layer(tmp_path: Path) -> None:
    """The layer's own set (here set 2) fills in what the copy's set leaves out; pass 0 stays the base."""
    layer = {"ffn_out_gain": np.full(32, 0.5)}
    explicit = [Step(0), Step(1, 0, BLOCK, 1, 1), Step(1, 1, BLOCK, 2, 2, OPEN | layer), Step(2, group=3, kv=3)]
    expected = evaluate(write(tmp_path, explicit, [NONE] * 4))
    inherited = [Step(0), Step(1, 0, BLOCK, 1, 1, layer), Step(1, 1, BLOCK, 2, 2, OPEN), Step(2, group=3, kv=3)]
    changes = {"step__pset": [0, 0, 2, 0], "layer__pset": ([0, 1, 0], TYPES.ARRAY, TYPES.UINT32)}
    assert np.array_equal(evaluate(write(tmp_path, inherited, [NONE] * 4, **changes)), expected)


def test_unknown_minor_keys_are_ignored(tmp_path: Path) -> None:
    plan = serial(gains())
    expected = evaluate(write(tmp_path, *plan))
    changed = write(tmp_path, *plan, version=[1, 7, 0], step__when=([0, 0, 1, 0], TYPES.ARRAY, TYPES.UINT8))
    assert np.array_equal(evaluate(changed), expected)


def test_an_unknown_major_version_runs_the_base_path_and_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, *serial(gains()), version=[2, 0, 0])
    assert np.array_equal(evaluate(path), base(tmp_path))
    with Model(path) as model:
        assert len(model.warnings) == 1
        assert "version 2 is ignored" in model.warnings[0]


def test_an_unknown_major_version_of_a_strict_file_refuses(tmp_path: Path) -> None:
    path = write(tmp_path, *serial(gains()), version=[2, 0, 0], strict=(True, TYPES.BOOL, None))
    with pytest.raises(NativeError, match="not acceptable"):
        Model(path)


U8, U32 = (TYPES.ARRAY, TYPES.UINT8), (TYPES.ARRAY, TYPES.UINT32)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "base order": ({"step__layer": [1, 0, 1, 2]}, "breaks its base path"),
    "base missing": ({"step__pass": [0, 0, 1, 1]}, "pass 0"),
    "base in parts": ({"step__parts": [1, 3, 3, 3]}, "breaks its base path"),
    "no parts": ({"step__parts": [0, 3, 3, 3]}, "step.parts is outside 1 to 3"),
    "groups": ({"step__group": [0, 1, 0, 1]}, "not contiguous"),
    "group gap": ({"step__group": [0, 1, 3, 4]}, "not contiguous"),
    "no merge": ({"step__group": [0, 1, 1, 2]}, "no merge"),
    "unknown merge": ({"group__merge": [0, 4, 0, 0]}, "outside 0 to 3"),
    "slot before use": ({"step__kv": [0, 2, 1, 3]}, "KV slot 2"),
    "no slot": ({"step__kv": [0, -1, 1, 2]}, "KV slot -1"),
    "slot of another layer": ({"step__kv": [0, 1, 0, 2]}, "KV slot 0 of another layer"),
    "shared slot in pass 0": ({"step__kv": [0, 0, 1, 2]}, "shares a KV slot"),
    "layer": ({"step__layer": [0, 1, 3, 2]}, "outside 0 to 2"),
    "length": ({"step__pass": [0, 0, 1]}, "3 elements"),
    "missing array": ({"step__kv": None}, "0 elements"),
    "base layers": ({"n_base": 4}, "n_base is 4, the model has 3"),
    "set": ({"step__pset": [0, 0, 2, 0]}, "outside 0 to 1"),
    "set bounds": ({"pset__first": [0, 9]}, "pset.first"),
    "set order": ({"pset__first": [1, 10]}, "pset.first"),
    "entry offset": ({"ent__off": [0] * 9 + [4_000_000_000]}, "outside the payload"),
    "entry length": ({"ent__len": [31] + [1] * 9}, "31 values, expected 32"),
    "kind": ({"ent__kind": [21] + [3] * 9}, "kind 21 .expert gain. cannot be executed"),
    "kind beyond": ({"ent__kind": [46] + [3] * 9}, "kind 46 .unknown. cannot be executed"),
    "encoding": ({"ent__enc": [2] * 10}, "encoding 2"),
    "whole number as half": ({"ent__kind": [18] + [3] * 9}, "kind 18 in the encoding 0"),
    "activation bits": ({"ent__kind": [18] + [3] * 9, "ent__enc": [2] + [0] * 9, "ent__len": [1] * 10}, "value"),
    "activation scale": ({"ent__kind": [16] + [3] * 9, "ent__len": [1] + [32] * 9, "payload": "AA" * 900}, "value 0"),
    "half a term": ({"ent__kind": [38, 4, 5, 6, 9, 10, 7, 8, 1, 2]}, "kinds 38 and 39. have the ranks 1 and 0"),
    "sparse term": ({"ent__kind": [38] + [3] * 9, "ent__enc": [1] + [0] * 9}, "kind 38 in the encoding 1"),
    "term of no rank": ({"ent__kind": [38] + [3] * 9, "ent__len": [0] + [1] * 9}, "a multiple of 32, at most 32 times"),
    "term beyond full rank": ({"ent__kind": [32] + [3] * 9, "ent__len": [33 * 32] + [1] * 9}, "at most 32 times"),
    "payload": ({"payload": "AAA*"}, "base64"),
    "empty payload": ({"payload": ""}, "outside the payload"),
    "gates": ({"step__pset": [0, 0, 0, 0]}, "no gate of its own"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_plan_refuses_but_leaves_the_base_path(name: str, tmp_path: Path) -> None:
    changes, sentence = WRONG[name]
    path = write(tmp_path, *serial(gains()), **changes)
    with Model(path) as model:
        with pytest.raises(NativeError, match=sentence + ".*without replication"):
            Session(model, threads=1)
        Session(model, threads=1, replication=False).eval(TOKENS)
