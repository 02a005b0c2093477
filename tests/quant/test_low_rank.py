"""Low-rank corrections: the closed form is the best of its rank, and budgets hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rondel.converters.checkpoint import open_checkpoint
from rondel.quant.deficits import Deficit, deficits, input_moments
from rondel.quant.low_rank import corrected, directions, factors, refine, spend
from rondel.quant.quantize import QuantizeConfig, quantize
from rondel.quant.reference import rms_norm
from rondel.quant.replicate import ReplicateConfig
from rondel.quant.student import Student
from rondel.quant.workers import Workers
from tests.tiny import tiny_model

FLOAT32_SUMS = 1e-4  # relative: sums over a few hundred float32 products
DAMPED = 0.01  # relative: the closed form sees moments with a thousandth of their mean on the diagonal


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Student, Student, torch.Tensor]:
    folder = tmp_path_factory.mktemp("low-rank")
    source = open_checkpoint(tiny_model("llama", folder / "m", width=256, hidden=256, vocabulary=64))
    packed = quantize(source, folder / "q", QuantizeConfig(type="Q2_K", method="imatrix", pure=True))
    windows = torch.randint(0, 64, (6, 32), generator=torch.Generator().manual_seed(0))
    return Student(packed), Student(source), windows


def random_deficit() -> Deficit:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(300, 24, generator=generator) * torch.logspace(0, -2, 24)
    stored, missing = torch.randn(2, 40, 24, generator=generator)
    moment = (inputs.T @ inputs).double() / len(inputs)
    return Deficit(stored, missing, moment, -(missing.double() @ moment).float())


def test_the_correction_is_the_best_of_its_rank() -> None:
    deficit = random_deficit()
    found = directions(deficit, 24)
    whole = torch.trace(deficit.missing.double() @ deficit.moment @ deficit.missing.double().T)

    def left_over(change: torch.Tensor) -> float:
        error = (deficit.missing - change).double()
        return float(torch.trace(error @ deficit.moment @ error.T) / whole)

    for rank in (1, 4, 24):
        ((left, right),) = factors({"w": found}, {"w": rank}).values()
        expected = 1 - sum(found.shares[:rank])
        assert abs(left_over(left @ right) - expected) < DAMPED
    plain = torch.linalg.svd(deficit.missing)
    truncated = plain.U[:, :4] * plain.S[:4] @ plain.Vh[:4]
    assert left_over(found.left[:, :4] @ found.right[:4]) < 0.5 * left_over(truncated)
    # The gradient is that of half the squared error, so what each rank gains is twice what it takes of that.
    assert sum(found.gains) == pytest.approx(deficit.gain(found.left @ found.right), rel=FLOAT32_SUMS)


def test_ranks_are_bought_where_they_gain_most() -> None:
    deficit = random_deficit()
    found = {"small": directions(deficit, 3), "large": directions(deficit, 3)}
    halved = Deficit(deficit.stored, deficit.missing, deficit.moment, deficit.gradient / 2)
    found["small"] = directions(halved, 3)
    each = found["large"].bytes
    assert spend(found, each - 1) == {}
    assert spend(found, each) == {"large": 1}
    assert sum(spend(found, 5 * each).values()) == 5
    worse = directions(Deficit(deficit.stored, deficit.missing, deficit.moment, -deficit.gradient), 3)
    assert spend({"worse": worse}, 10 * each) == {}


def test_moments_are_those_of_the_inputs(models: tuple[Student, Student, torch.Tensor]) -> None:
    student, _, windows = models
    with Workers(2) as workers:
        found = input_moments(student, windows, workers)
    x = student.embed(windows)
    read = rms_norm(x, student.norm(0, "attn_norm"), student.numbers.norm_epsilon).flatten(0, 1).double()
    assert torch.allclose(found["blk.0.attn_v.weight"], read.T @ read / len(read), rtol=FLOAT32_SUMS, atol=1e-6)
    assert found["blk.0.attn_v.weight"] is found["blk.0.attn_q.weight"]
    assert set(found) == {
        name for name in student.tensors if ".weight" in name and "blk" in name and "norm" not in name
    }


def test_corrections_bring_the_student_nearer(models: tuple[Student, Student, torch.Tensor]) -> None:
    student, teacher, windows = models
    config = ReplicateConfig(steps=8)

    def distance(chosen: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> float:
        with torch.no_grad():
            wanted = torch.log_softmax(teacher.logits(windows), -1)
            log_p = torch.log_softmax(student.logits(windows, weights=corrected(student, chosen)), -1)
            return float((wanted.exp() * (wanted - log_p)).sum(-1).mean())

    with Workers(2) as workers:
        found = {name: directions(one, 8) for name, one in deficits(student, teacher, windows, workers).items()}
        chosen = factors(found, spend(found, 16 * 1024))
        fitted = refine(student, teacher, windows, chosen, config, workers=workers)
    with Workers(1) as workers:
        again = refine(student, teacher, windows, chosen, config, workers=workers)
    assert distance(fitted) < distance(chosen) < distance({})
    for name, pair in fitted.items():
        for one, other in zip(pair, again[name], strict=True):
            assert torch.equal(one, other)  # one thread or two: the same bits
            assert torch.equal(one, one.half().float())


def test_norm_gains_of_another_scale_are_no_deficit(tmp_path: Path) -> None:
    """A student whose norm is scaled and whose matrices are divided by it lacks what rounding took, no more."""
    source = open_checkpoint(tiny_model("llama", tmp_path / "m", width=256, hidden=256, vocabulary=64))
    packed = quantize(source, tmp_path / "q", QuantizeConfig(type="Q2_K", method="imatrix", pure=True))
    windows = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    student, teacher = Student(packed), Student(source)
    scale = torch.linspace(0.5, 2, 256)
    teacher.tensors["blk.1.ffn_norm.weight"] = teacher.tensors["blk.1.ffn_norm.weight"] / scale
    for role in ("ffn_gate", "ffn_up"):
        teacher.tensors[f"blk.1.{role}.weight"] = teacher.tensors[f"blk.1.{role}.weight"] * scale
    with Workers(1) as workers:
        scaled = deficits(student, teacher, windows, workers)
        plain = deficits(student, Student(source), windows, workers)
    for name, deficit in plain.items():
        assert torch.allclose(scaled[name].missing, deficit.missing, atol=1e-5), name
