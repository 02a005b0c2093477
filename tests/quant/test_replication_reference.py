"""One replicated model in the runtime, in the float64 reference, and as real layers in llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.export import ExportConfig, export
from rondel.converters.replication import ATTENTION, BLOCK, FFN, NO_SLOT, Replication, Step
from rondel.converters.replication_codec import encode_replication
from rondel.converters.replication_kinds import LOW_RANK, ParameterSet, kind_shape
from rondel.native.model import Model, Session
from rondel.quant.replication_reference import replicated_logits
from tests.converters.test_materialize import HEADS, HIDDEN, WIDTH, gates, replicated, spread, write
from tests.tiny import tiny_model

TOKENS = [3, 5, 7, 11, 13, 2, 9, 4]
RUNTIME_ERROR = 1e-5  # float32 against float64, relative to the largest logit
PEER_ERROR = 2e-3  # llama.cpp keeps keys and values as float16


def folded() -> ParameterSet:
    """Every kind that a real layer can hold."""
    return gates(
        attn_norm_gain=spread(WIDTH, 1),
        ffn_norm_gain=spread(WIDTH, 2),
        attn_out_gain=spread(WIDTH, 3),
        ffn_out_gain=spread(WIDTH, 4),
        ffn_hidden_gain=spread(HIDDEN, 6),
    )


def unfolded(source: Checkpoint, seed: int, **more: float) -> ParameterSet:
    """Kinds that no real layer can hold, and head gains; `more` are activation kinds."""
    generator = np.random.default_rng(seed)
    values: dict[str, Any] = {name: np.array([value]) for name, value in more.items()}
    values["q_head_gain"] = spread(HEADS, seed)
    values["attn_out_bias"], values["ffn_out_bias"] = (0.1 * generator.standard_normal(WIDTH) for _ in range(2))
    for role in LOW_RANK:
        for half in ("left", "right"):
            shape = kind_shape(f"{role}_{half}", source.numbers, 3)
            values[f"{role}_{half}"] = 0.3 * generator.standard_normal(shape)
    return folded() | gates(0.5, -0.25, **values)


def runtime(path: Path, batch: int = 512) -> np.ndarray:
    with Model(path) as model, Session(model, batch=batch, threads=1) as session:
        return session.eval(TOKENS, all=True)


def reference(source: Checkpoint) -> np.ndarray:
    return replicated_logits(source, torch.tensor(TOKENS)).numpy()


def close(a: np.ndarray, b: np.ndarray, error: float) -> bool:
    return bool(np.abs(a - b).max() <= error * np.abs(b).max())


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_runtime_reference_and_llama_cpp_agree_on_serial_copies(family: str, tmp_path: Path) -> None:
    from tests.peer.llama import Llama, find_library

    source = replicated(tmp_path, [(0, BLOCK, folded()), (1, FFN, gates()), (1, ATTENTION, gates())], family=family)
    expected = reference(source)
    (path,) = export(source, tmp_path / "steps.gguf", ExportConfig(type="F32"))
    got = runtime(path)
    assert close(got, expected, RUNTIME_ERROR)
    assert np.array_equal(runtime(path, batch=1), got)
    (layers,) = export(source, tmp_path / "layers.gguf", ExportConfig(type="F32", materialize=True))
    assert close(runtime(layers), expected, RUNTIME_ERROR)
    if find_library() is not None:
        with Llama(layers, context=64, threads=1) as model:
            assert close(model.eval(TOKENS), expected, PEER_ERROR)
        with Llama(path, context=64, threads=1) as model:  # it knows nothing of the keys: the base path
            base = reference(open_checkpoint(tmp_path / "model"))
            assert close(model.eval(TOKENS), base, PEER_ERROR)
            assert not close(base, expected, 10 * PEER_ERROR)


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_runtime_and_reference_agree_on_everything_else(merge: int, tmp_path: Path) -> None:
    """Parallel copies with shared keys and with their own, a serial copy on earlier keys, every kind of parameter."""
    model = open_checkpoint(tiny_model("qwen3", tmp_path / "model", width=WIDTH, heads=HEADS, hidden=HIDDEN))
    steps = (
        Step(0, 0, 0, 0),
        Step(0, 1, 0, 1, BLOCK, 1),
        Step(0, 2, 0, 0, ATTENTION, 2),
        Step(0, 3, 0, NO_SLOT, FFN, 3),
        Step(0, 4, 1, 0, BLOCK, 4),
        Step(1, 0, 2, 2),
        Step(1, 1, 3, 3, BLOCK, 3),
    )
    sets = (
        unfolded(model, 1, act_bits=4, act_scale=1.5),
        gates(0.5, 0.0, q_head_gain=spread(HEADS, 9)),
        unfolded(model, 2, act_bits=3, rounding=5, rotation_seed=6),
        folded(),
    )
    found = Replication(2, steps, (merge, 0, 0, 0), sets)
    record = encode_replication(found, model.numbers)
    source = write(model, tmp_path / "replicated", {**model.carried(), "replication": record}, None)
    (path,) = export(source, tmp_path / "m.gguf", ExportConfig(type="F32", target="rondel"))
    got = runtime(path)
    assert close(got, reference(source), RUNTIME_ERROR)
    assert np.array_equal(runtime(path, batch=3), got)
