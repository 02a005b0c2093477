"""What copies cost: bytes stored, bytes read a token, caches, multiplications."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.replication import Replication
from rondel.quant.choice_config import ChoiceConfig
from rondel.quant.copy_plan import Copy, CopyPlan
from rondel.quant.quantize import QuantizeConfig, quantize
from rondel.quant.replicate import ReplicateConfig, build_replication
from rondel.quant.replication_cost import (
    copy_of_every_layer,
    extra_compute,
    kv_bytes,
    model_bytes,
    read_bytes,
    stored_bytes,
)
from rondel.quant.student import Student
from tests.tiny import tiny_model

LAYERS = 3
CONTEXT = 512


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("cost")
    return quantize(
        open_checkpoint(tiny_model("qwen3", folder / "m", layers=LAYERS)),
        folder / "q",
        QuantizeConfig("Q4_0", pure=True),
    )


def steps(source: Checkpoint, *layers: str) -> Replication:
    built = build_replication(ReplicateConfig(layers), source.numbers)
    assert built is not None
    return built


def matrices(source: Checkpoint, layer: int, *roles: str) -> int:
    names = [name for name in source.names() if name.startswith(f"blk.{layer}.") and source.info(name).packed]
    return sum(source.packed(name).data.numel() for name in names if not roles or name.split(".")[2] in roles)


def test_serial_copies_read_their_layer_again_and_parallel_ones_do_not(source: Checkpoint) -> None:
    for layers, read in (
        (["1:serial:1"], matrices(source, 1)),
        (["1:serial:2"], 2 * matrices(source, 1)),
        (["0:serial:1:ffn"], matrices(source, 0, "ffn_gate", "ffn_up", "ffn_down")),
        (["1:parallel:3:mean"], 0),
        (["2:parallel:1:sum", "2:serial:1"], matrices(source, 2)),
    ):
        found = steps(source, *layers)
        assert read_bytes(found, source) == stored_bytes(found) + read, layers


def test_only_copies_with_attention_of_their_own_have_caches(source: Checkpoint) -> None:
    one = 2 * 2 * source.numbers.kv_heads * source.numbers.head_dim * CONTEXT
    for layers, caches in (
        (["1:serial:2"], 2),
        (["1:serial:1:ffn"], 0),
        (["1:parallel:2:mean"], 0),
    ):
        assert kv_bytes(steps(source, *layers), source, CONTEXT) == caches * one, layers


def test_compute_is_counted_as_the_choice_counts_it(source: Checkpoint) -> None:
    student, config = Student(source), ChoiceConfig()
    for copies in ([Copy(1, "serial", "block")], [Copy(0, "parallel", "attn"), Copy(2, "serial", "ffn")]):
        plan = CopyPlan(copies, student, config)
        assert extra_compute(plan.replication, source) == pytest.approx(plan.compute)
    assert extra_compute(steps(source, "1:serial:1"), source) == pytest.approx(1 / LAYERS)


def test_a_fitted_copy_of_every_layer(source: Checkpoint) -> None:
    plan = CopyPlan([Copy(layer, "serial", "block") for layer in range(LAYERS)], Student(source), ChoiceConfig())
    assert copy_of_every_layer(source) == plan.bytes


def test_the_bytes_of_a_model_are_those_of_its_tensors(source: Checkpoint, tmp_path: Path) -> None:
    data = [source.packed(n).data if source.info(n).packed else source.read(n) for n in source.names()]
    assert model_bytes(source) == sum(one.numel() * one.element_size() for one in data)


def test_every_setting_of_the_choice_is_one_of_the_stage() -> None:
    stage = {field.name: field for field in fields(ReplicateConfig)}
    for field in fields(ChoiceConfig):
        assert stage[field.name].default == field.default, field.name
