"""Does rotate by default turn what gains by it, leave alone what does not, and tell the truth about both?"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.export import ExportConfig, export
from rondel.converters.stats import Stats, open_stats, stats_for
from rondel.native import Model, Session
from rondel.quant import rotate as rotate_stage
from rondel.quant import rotation_choice
from rondel.quant.calibrate import CalibrateConfig, calibrate
from rondel.quant.calibration_text import CalibrationText
from rondel.quant.perplexity import log_softmax
from rondel.quant.quantize import QuantizeConfig, quantize
from rondel.quant.quantize import plan as plan_quantize
from rondel.quant.quantize_task import prepare
from rondel.quant.rotate import RotateConfig, plan, rotate
from rondel.quant.rotation_choice import AS_IS, BOTH, MARGIN, ROTATE, SCALE, WAYS, _Basis, _stream_counts, decide
from tests.quant.turned import principal_axes, turned
from tests.tiny import tiny_model

STORIES = Path(__file__).parents[1] / "models" / "stories-4m"
TEXT = STORIES.with_name("stories.txt")
ENOUGH = CalibrateConfig(tokens=2048, context=128)
SPREAD = 30.0  # of the embedding's principal axes, largest to smallest root mean square
SAME = 1e-4  # relative: float32 products in the measure
RECOVERED = 1.15  # mean KL of the turned model, of that in its good basis
SPOILED = 1.3  # what principal axes must at least cost, or the test shows nothing


def seen(source: Checkpoint, folder: Path, *, windows: int = 8, context: int = 32) -> Stats:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, source.numbers.vocabulary, (windows, context), generator=generator)
    return calibrate(source, folder, CalibrateConfig(context=context), CalibrationText(tokens, ("random",)), threads=1)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model with a stream of few directions, none of them along a channel."""
    folder = tmp_path_factory.mktemp("good")
    source = open_checkpoint(tiny_model("llama", folder / "hf", vocabulary=512, width=96, hidden=96, layers=2))
    embedding = source.read_float("token_embd.weight", torch.float64)
    axes = torch.linalg.qr(torch.randn(96, 96, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    sizes = torch.logspace(0, -math.log10(SPREAD), 96, dtype=torch.float64)
    shaped = (embedding * sizes).to(torch.float32)
    read = source.read
    source.read = lambda name: shaped if name == "token_embd.weight" else read(name)  # type: ignore[method-assign]
    return turned(source, axes, folder / "good")


@pytest.fixture(scope="module")
def good_stats(good: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    return seen(good, tmp_path_factory.mktemp("stats") / "calib")


@pytest.fixture(scope="module")
def poor(good: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The same model, whose stream stands in its principal axes."""
    return turned(good, principal_axes(good), tmp_path_factory.mktemp("poor") / "poor")


@pytest.fixture(scope="module")
def poor_stats(poor: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Stats:
    return seen(poor, tmp_path_factory.mktemp("stats") / "calib")


def test_decides_by_decibels_with_a_margin() -> None:
    def decided(scale: float, rotate: float, both: float) -> str:
        return decide({AS_IS: 0.0, SCALE: scale, ROTATE: rotate, BOTH: both})[0]

    assert decided(0.0, -1.0, -1.01) == ROTATE
    assert decided(0.0, -1.0, -2.0) == BOTH
    assert decided(-3.0, -1.0, -2.0) == SCALE
    assert decided(-0.01, 0.5, 1.0) == AS_IS
    assert decided(0.0, -MARGIN / 2, -MARGIN / 2) == AS_IS
    assert "less than" in decide({AS_IS: 0.0, SCALE: 0.0, ROTATE: -MARGIN / 2, BOTH: 0.0})[1]


def test_principal_axes_are_left_and_a_good_basis_is_kept(
    good: Checkpoint, good_stats: Stats, poor: Checkpoint, poor_stats: Stats, tmp_path: Path
) -> None:
    config = RotateConfig(type="Q4_0")
    made = rotate(poor, tmp_path / "poor", config, poor_stats, threads=1)
    told = made.manifest["rotation_choice"]
    assert told["chosen"] in (ROTATE, BOTH)
    assert told["bytes"]["now"] == told["bytes"]["rotated"]
    plain = rotate(poor, tmp_path / "plain", RotateConfig(rotate="always"), poor_stats, threads=1)
    assert all(made.info(name).sha256 == plain.info(name).sha256 for name in plain.names())
    kept = rotate(good, tmp_path / "good", config, good_stats, threads=1)
    assert kept.manifest["rotation_choice"]["chosen"] in (AS_IS, SCALE)


def test_a_model_that_is_left_alone_keeps_its_bytes_and_its_statistics(
    good: Checkpoint, good_stats: Stats, tmp_path: Path
) -> None:
    kept = rotate(good, tmp_path / "kept", RotateConfig(type="Q4_0", kind="orthogonal"), good_stats, threads=1)
    assert kept.rotations == []
    assert all(kept.info(name).sha256 == good.info(name).sha256 for name in good.names())
    assert kept.names() == good.names()
    assert not (tmp_path / "kept" / "rotations.safetensors").exists()
    inside = stats_for(kept, None)
    assert inside is not None
    assert torch.equal(inside.absmax(1, "hidden"), good_stats.absmax(1, "hidden"))
    quantized = quantize(kept, tmp_path / "q", QuantizeConfig("Q4_0", method="imatrix"), inside, threads=1)
    direct = quantize(good, tmp_path / "d", QuantizeConfig("Q4_0", method="imatrix"), good_stats, threads=1)
    assert all(quantized.info(name).sha256 == direct.info(name).sha256 for name in direct.names())


def test_the_table_has_every_matrix_and_sums_to_its_last_line(
    poor: Checkpoint, poor_stats: Stats, tmp_path: Path
) -> None:
    told = plan(poor, RotateConfig(type="Q4_0"), poor_stats, threads=1)["choice"]
    roles = [linear.role for linear in poor.family.linears]
    *lines, whole = told["tensors"]
    assert [line["tensors"] for line in lines] == [*roles, "output", "token_embd"]
    layers = {line["tensors"]: 1 if line["tensors"] in ("output", "token_embd") else 2 for line in lines}
    total = sum(layers[line["tensors"]] * line["error"] for line in lines)
    assert math.isclose(total, whole["error"], rel_tol=SAME)
    for way in WAYS[1:]:
        lost = sum(layers[line["tensors"]] * line["error"] * 10 ** (line[way] / 10) for line in lines)
        assert abs(10 * math.log10(lost / total) - whole[way]) < 0.02  # the lines have two decimals
        assert abs(told["decibels"][way] - whole[way]) < 0.01


def test_what_the_stream_counts_is_the_same_sum_in_every_basis(
    good: Checkpoint, good_stats: Stats, poor: Checkpoint, poor_stats: Stats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "mean", lambda self: torch.ones((), dtype=self.dtype))
    sums = [
        float(
            _stream_counts(
                _Basis(model, lambda place, of=of: of.second_moment(*place), {}, None), [0, 1], head=True
            ).sum()
        )
        for model, of in ((good, good_stats), (poor, poor_stats))
    ]
    assert math.isclose(*sums, rel_tol=SAME)


def test_an_untied_head_is_paid_for(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model("llama", tmp_path / "hf", tied=True, width=96, vocabulary=512))
    told = plan(source, RotateConfig(type="Q4_0"), seen(source, tmp_path / "calib"), threads=1)["choice"]
    assert told["bytes"]["rotated"] > told["bytes"]["now"]
    assert told["decibels_for_bytes"] > 0
    assert math.isclose(
        told["decibels"][ROTATE] - told["tensors"][-1][ROTATE], told["decibels_for_bytes"], abs_tol=0.01
    )
    kept = RotateConfig(type="Q4_0", keep_tied=True, target="rondel")
    told = plan(source, kept, open_stats(tmp_path / "calib"), threads=1)["choice"]
    assert told["decibels_for_bytes"] == 0
    assert next(line for line in told["tensors"] if line["tensors"] == "token_embd")[ROTATE] == 0


@pytest.mark.parametrize(("bit", "format"), [(0.0, "Q8_0"), (100.0, "Q4_0")])
def test_an_untied_embedding_keeps_its_type_where_that_pays(
    bit: float, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixture gives the embedding less once it is not the head; quantize gives it what was decided."""
    source = open_checkpoint(tiny_model("llama", tmp_path / "hf", tied=True, width=96, vocabulary=320))
    stats = seen(source, tmp_path / "calib")
    monkeypatch.setattr(rotation_choice, "BIT", bit)
    monkeypatch.setattr(rotation_choice, "MARGIN", -math.inf)  # it rotates
    made = rotate(source, tmp_path / "rotated", RotateConfig(type="Q4_0"), stats, threads=1)
    told = made.manifest["rotation_choice"]
    assert told.get("embedding_type") == ("Q8_0" if format == "Q8_0" else None)
    line = next(line for line in told["tensors"] if line["tensors"] == "token_embd")
    assert line["formats"] == ("Q8_0" if format == "Q8_0" else "Q8_0 to Q4_0")
    planned = {line["name"]: line for line in plan_quantize(made, QuantizeConfig("Q4_0"))["tensors"]}
    assert planned["token_embd.weight"]["format"] == format
    matrices = [line["bytes"] for line in planned.values() if line["format"] != "F32"]
    assert sum(matrices) == told["bytes"]["rotated"]
    for asked in (
        QuantizeConfig("Q4_0", embedding_type="Q5_0"),
        QuantizeConfig("Q4_0", tensors=(("token_embd", "Q5_0"),)),
    ):
        assert prepare(made, asked, None).choices["token_embd.weight"].format == "Q5_0"
    assert prepare(made, QuantizeConfig("Q5_0"), None).choices["token_embd.weight"].format == "Q5_0"


def test_quantize_follows_the_way_that_was_chosen(good: Checkpoint, good_stats: Stats, tmp_path: Path) -> None:
    def method(chosen: str, **config: str) -> str:
        choice = {"type": "Q4_0", "chosen": chosen, "method": chosen}
        decided = Checkpoint(good.root, good.manifest | {"rotation_choice": choice})
        return prepare(decided, QuantizeConfig(**({"type": "Q4_0"} | config)), good_stats).method.name

    assert method("awq+gptq") == "awq+gptq"
    assert method("gptq") == "gptq"
    assert method("awq+gptq", type="Q5_0") == "gptq"
    assert method("awq+gptq", method="imatrix") == "imatrix"
    assert method("awq+imatrix") == "gptq"  # there was no text then


def test_an_interrupted_run_does_not_choose_again(
    poor: Checkpoint, poor_stats: Stats, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(done: int, total: int, what: str) -> None:
        if what == "blk-00001":
            raise KeyboardInterrupt

    config = RotateConfig(type="Q4_0")
    with pytest.raises(KeyboardInterrupt):
        rotate(poor, tmp_path / "out", config, poor_stats, threads=1, progress=stop)
    monkeypatch.setattr(rotate_stage, "choose", None)
    assert rotate(poor, tmp_path / "out", config, poor_stats, threads=1).manifest["rotation_choice"]["chosen"] != AS_IS


def test_without_statistics_it_turns_as_asked_and_says_so(good: Checkpoint, tmp_path: Path) -> None:
    made = rotate(good, tmp_path / "out", RotateConfig(type="Q4_0"), threads=1)
    told = made.manifest["rotation_choice"]
    assert (told["type"], told["chosen"]) == ("Q4_0", ROTATE)
    assert "nothing is measured" in told["reason"]
    assert [one.site for one in made.rotations] == ["residual", "heads"]
    assert plan(good, RotateConfig(type="Q4_0"))["choice"] == told
    forced = rotate(good, tmp_path / "forced", RotateConfig(rotate="always"), threads=1)
    assert "rotation_choice" not in forced.manifest
    assert all(forced.info(name).sha256 == made.info(name).sha256 for name in forced.names())


def test_never_leaves_the_model_and_its_statistics(good: Checkpoint, good_stats: Stats, tmp_path: Path) -> None:
    never = RotateConfig(rotate="never", kind="dfrot")
    kept = rotate(good, tmp_path / "kept", never, good_stats, threads=1)
    assert kept.rotations == []
    assert all(kept.info(name).sha256 == good.info(name).sha256 for name in good.names())
    assert open_stats(tmp_path / "kept").windows() is not None
    assert plan(good, never)["rotations"] == []
    rotated = rotate(good, tmp_path / "rotated", RotateConfig(heads=False), threads=1)
    with pytest.raises(RondelError, match="rotated already"):
        rotate(rotated, tmp_path / "out", never)


def test_online_rotations_are_decided_too(good: Checkpoint, good_stats: Stats, tmp_path: Path) -> None:
    """They go with the others, unless they are forced."""
    asked = RotateConfig(type="Q4_0", hidden="full", target="rondel")
    assert rotate(good, tmp_path / "auto", asked, good_stats, threads=1).rotations == []
    made = rotate(good, tmp_path / "always", replace(asked, rotate="always"), good_stats, threads=1)
    assert [one.site for one in made.rotations] == ["residual", "heads", "hidden"]


def test_refuses_a_type_that_there_is_not(good: Checkpoint, good_stats: Stats, tmp_path: Path) -> None:
    for given in (None, good_stats):
        with pytest.raises(RondelError, match="Q9"):
            rotate(good, tmp_path / "out", RotateConfig(type="Q9"), given)
    with pytest.raises(RondelError, match=r"U4-128: llama\.cpp cannot read this format"):
        rotate(good, tmp_path / "out", RotateConfig(type="U4"), good_stats)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Stats]:
    source = open_checkpoint(STORIES)
    return source, calibrate(source, tmp_path_factory.mktemp("stories") / "calib", ENOUGH, [TEXT], threads=1)


def logits(model: Checkpoint, tokens: list[list[int]], folder: Path) -> torch.Tensor:
    (file,) = export(model, folder, ExportConfig())
    with Model(file) as opened:
        rows = []
        for window in tokens:
            with Session(opened, context=len(window), threads=1) as session:
                rows.append(torch.from_numpy(log_softmax(session.eval(window, all=True))))
    return torch.cat(rows)


@pytest.mark.skipif(not STORIES.is_dir(), reason="there is no model to measure")
@pytest.mark.parametrize("type_", ["Q2_K", "Q4_0"])
def test_a_tied_model_is_left_alone(type_: str, stories: tuple[Checkpoint, Stats]) -> None:
    """Rotated, this model's mean divergence is .040 at Q2_K, and it is larger; as it is, .020."""
    source, stats = stories
    choice = plan(source, RotateConfig(type=type_), stats, threads=1)["choice"]
    assert choice["chosen"] in (AS_IS, SCALE), choice


@pytest.mark.skipif(not STORIES.is_dir(), reason="there is no model to measure")
def test_a_model_in_its_principal_axes_recovers(tmp_path: Path) -> None:
    """The divergence is measured on some of the calibration's windows, which is enough to tell bases apart."""
    source = open_checkpoint(STORIES)
    bases = {"good": torch.eye(256, dtype=torch.float64), "poor": principal_axes(source)}
    models = {name: turned(source, matrix, tmp_path / name) for name, matrix in bases.items()}
    stats = {
        name: calibrate(model, tmp_path / f"{name}-calib", ENOUGH, [TEXT], threads=1) for name, model in models.items()
    }
    made = rotate(models["poor"], tmp_path / "auto", RotateConfig(type="Q4_0"), stats["poor"], threads=1)
    assert made.rotations, made.manifest["rotation_choice"]
    models["turned"], stats["turned"] = made, open_stats(tmp_path / "auto")
    windows = stats["good"].windows()
    assert windows is not None
    tokens = windows[:4].tolist()
    expected, kl = logits(models["good"], tokens, tmp_path / "float.gguf"), {}
    for name, model in models.items():
        wanted = QuantizeConfig("Q4_0", asymmetric=False)
        quantized = quantize(model, tmp_path / f"{name}-q", wanted, stats[name], threads=1)
        found = logits(quantized, tokens, tmp_path / f"{name}.gguf")
        kl[name] = float((expected.exp() * (expected - found)).sum(1).mean())
    assert kl["poor"] > SPOILED * kl["good"], kl
    assert kl["turned"] < RECOVERED * kl["good"], kl
