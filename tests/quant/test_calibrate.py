"""Does calibrate see what a whole transformers model sees, and does it end with the same bytes however it ran?"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.imatrix import read_imatrix
from rondel.converters.stats import Stats, open_stats
from rondel.quant import calibrate as stage
from rondel.quant.activations import StreamSummary, stream_of
from rondel.quant.calibrate import CalibrateConfig, calibrate, plan
from rondel.quant.calibration_text import CalibrationText, tokenize
from rondel.quant.importance import open_imatrix
from rondel.quant.quantize_task import QuantizeConfig, prepare
from rondel.quant.rotate import RotateConfig, rotate
from tests.tiny import tiny_model

# Means over a few hundred products in float32, in another order than the oracle's float64 ones; of the largest entry.
FLOAT32_SUMS = 2e-5
# Two float32 passes, one of them through weights that a rotation rounded to F32.
ROTATED = 1e-4
CONFIG = CalibrateConfig(tokens=160, context=32)
STORY = Path(__file__).parent.parent / "models" / "stories.txt"


def model(family: str, folder: Path, **more: object) -> Checkpoint:
    return open_checkpoint(tiny_model(family, folder / family, **more))


def windows(count: int = 5, context: int = 32) -> CalibrationText:
    ids = torch.randint(0, 288, (count, context), generator=torch.Generator().manual_seed(4))
    return CalibrationText(ids, ("random",))


def seen_by_transformers(source: Checkpoint, text: CalibrationText) -> dict[str, torch.Tensor]:
    """Inputs (tokens, d) of every linear in a forward pass of the whole model, by "layer.source" name."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(source.root, dtype=torch.float32).eval()
    seen: dict[str, torch.Tensor] = {}
    for name, module in whole.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: seen.__setitem__(name, inputs[0].flatten(0, -2).double())
            )
    with torch.no_grad():
        whole(text.windows)
    return seen


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return bool((got.double() - expected).abs().max() < tolerance * expected.abs().max())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_statistics_are_those_of_the_whole_model(family, tmp_path):
    source, text = model(family, tmp_path, tied=family == "qwen2"), windows()
    stats = calibrate(source, tmp_path / "calib", CONFIG, text)
    seen = seen_by_transformers(source, text)
    places = [
        (layer, linear.reads, f"model.layers.{layer}.{linear.source}")
        for layer in range(2)
        for linear in source.family.linears
    ]
    for layer, site, name in [*places, (None, "output_in", "lm_head")]:
        x = seen[name]
        assert close(stats.second_moment(layer, site), x.T @ x / len(x), FLOAT32_SUMS), name
        assert close(stats.absmax(layer, site), x.abs().amax(0), FLOAT32_SUMS)
        assert torch.equal(stats.diagonal(layer, site), stats.second_moment(layer, site).diagonal())
        assert stats.count(layer, site) == text.tokens == len(x)
    assert stats.manifest["calibration"] == {"sha256": text.sha256(), "tokens": text.tokens}
    norm = stats.manifest["residual"]["blk.1"]["token_norm"]
    assert 0 < norm["median"] <= norm["max"]


def test_diagonals_alone_and_the_imatrix(tmp_path):
    source, text = model("qwen3", tmp_path), windows()
    full = calibrate(source, tmp_path / "full", CONFIG, text)
    only = calibrate(source, tmp_path / "only", CalibrateConfig(tokens=160, context=32, diagonal=True), text)
    assert only.second_moment(0, "hidden") is None
    assert close(only.diagonal(1, "hidden"), full.diagonal(1, "hidden").double(), FLOAT32_SUMS)
    imatrix = read_imatrix(tmp_path / "full" / "imatrix.gguf")
    assert len(imatrix.values) == 2 * 7 + 1
    assert imatrix.chunk_size == 32
    assert imatrix.counts["blk.0.attn_q.weight"] == 160
    assert np.allclose(imatrix.values["blk.1.ffn_down.weight"], full.diagonal(1, "hidden").numpy(), rtol=1e-6)


def test_massive_activations_are_found(tmp_path):
    folder = tiny_model("llama", tmp_path / "llama")
    source, text = open_checkpoint(folder), windows()
    original = source.read

    def spiked(name: str) -> torch.Tensor:
        tensor = original(name)
        if name == "token_embd.weight":
            tensor = tensor.clone()
            tensor[int(text.windows[2, 7]), 5] = 900.0
        return tensor

    source.read = spiked
    stats = calibrate(source, tmp_path / "calib", CONFIG, text)
    found = stats.manifest["residual"]["blk.0"]["massive_activations"]
    assert {"window": 2, "position": 7, "channel": 5} in [
        {k: v for k, v in one.items() if k != "value"} for one in found
    ]
    assert all(abs(one["value"]) > 500 for one in found)


def folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


@pytest.mark.parametrize("budget", [stage.STATES_IN_MEMORY, 0], ids=["memory", "disk"])
def test_same_bytes_for_any_threads_and_after_interruptions(budget, tmp_path, monkeypatch):
    source, text = model("qwen2", tmp_path, layers=4), windows()
    calibrate(source, tmp_path / "undisturbed", CONFIG, text, threads=1)
    expected = folder_hash(tmp_path / "undisturbed")
    monkeypatch.setattr(stage, "STATES_IN_MEMORY", budget)
    calibrate(source, tmp_path / "three", CONFIG, text, threads=3)
    assert folder_hash(tmp_path / "three") == expected

    for last in (1, 3, 4):

        def stop(done: int, total: int, what: str, last: int = last) -> None:
            if done == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrate(source, tmp_path / "stopped", CONFIG, text, progress=stop)
        assert not (tmp_path / "stopped").exists()
    calibrate(source, tmp_path / "stopped", CONFIG, text)
    assert folder_hash(tmp_path / "stopped") == expected
    assert {path.suffix for path in (tmp_path / "stopped").iterdir()} == {".safetensors", ".json", ".gguf"}


@pytest.mark.parametrize("tied", [False, True])
def test_rotated_models_can_be_calibrated(tied, tmp_path):
    """What a rotated model sees is what moving the plain model's statistics says, online rotations included."""
    source, text = model("llama", tmp_path, heads=6, width=48, kv_heads=2, head_dim=16, tied=tied), windows()
    stats = calibrate(source, tmp_path / "calib", CONFIG, text)
    config = RotateConfig(rotate="always", hidden="full", queries=8, keep_tied=tied, target="rondel")
    rotated = rotate(source, tmp_path / "rotated", config, stats)
    moved, seen = open_stats(tmp_path / "rotated"), calibrate(rotated, tmp_path / "again", CONFIG, text)
    seen.check_basis(rotated)
    for layer, site in [
        (0, "attn_in"),
        (1, "attn_in"),
        (0, "heads"),
        (1, "ffn_in"),
        (1, "hidden"),
        (None, "output_in"),
    ]:
        assert close(moved.second_moment(layer, site), seen.second_moment(layer, site).double(), ROTATED), (layer, site)
    if tied:  # the head reads what it read before
        assert close(seen.second_moment(None, "output_in"), stats.second_moment(None, "output_in").double(), ROTATED)


def test_text_is_cut_into_windows(tmp_path):
    source = model("qwen3", tmp_path)
    text = tokenize(source, [STORY], tokens=320, context=32, seed=0)
    assert text.windows.shape == (10, 32)
    assert text.names == ("stories.txt",)
    again = tokenize(source, [STORY], tokens=320, context=32, seed=0)
    assert again.sha256() == text.sha256()
    other = tokenize(source, [STORY], tokens=320, context=32, seed=1)
    assert other.sha256() != text.sha256()
    chat = tokenize(source, [STORY], tokens=320, context=32, seed=0, chat=True)
    start = source.numbers.vocabulary - 2  # <|im_start|> as one token and not as letters
    assert (chat.windows == start).any()
    assert not (text.windows == start).any()


def test_refusals(tmp_path):
    source, out = model("qwen3", tmp_path), tmp_path / "calib"
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time")
    with pytest.raises(RondelError, match=r"short\.txt: the text has \d+ tokens"):
        calibrate(source, out, CONFIG, [short])
    with pytest.raises(RondelError, match="missing\\.txt: cannot be read"):
        calibrate(source, out, CONFIG, [tmp_path / "missing.txt"])
    with pytest.raises(RondelError, match="2 to 128 tokens, got 512"):
        calibrate(source, out, CalibrateConfig(), [STORY])
    with pytest.raises(RondelError, match="do not fill one window"):
        calibrate(source, out, CalibrateConfig(tokens=16, context=32), [STORY])
    with pytest.raises(RondelError, match="--device nonsense"):
        calibrate(source, out, CONFIG, [STORY], device="nonsense")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("calib")] == []


def test_plan_tells_the_size(tmp_path):
    source, text = model("qwen3", tmp_path), windows()
    told = plan(source, CONFIG, text)
    stats: Stats = calibrate(source, tmp_path / "calib", CONFIG, text)
    assert told["tensor_bytes"] == sum(4 * stats.read(name).numel() for name in stats.names())
    assert told["tokens"] == 160


def test_the_text_travels_as_token_ids(tmp_path):
    source, text = model("qwen3", tmp_path), windows()
    stats = calibrate(source, tmp_path / "calib", CONFIG, text)
    rotate(
        source,
        tmp_path / "rotated",
        RotateConfig(
            rotate="always",
        ),
        stats,
    )
    for found in (stats, open_stats(tmp_path / "rotated")):
        assert found.info("windows").format == "I32"
        assert torch.equal(found.windows(), text.windows)
    old = Stats(stats.root, {**stats.manifest, "tensors": {}})
    assert old.windows() is None
    small = {**stats.manifest["hyperparameters"], "vocabulary": 100}
    with pytest.raises(RondelError, match="expected int32 windows of tokens below 100"):
        Stats(stats.root, {**stats.manifest, "hyperparameters": small}).windows()


def test_positions_that_hold_the_largest_values_are_told() -> None:
    """Outliers of a token stand at its position; those of a channel are spread over all."""
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    tokens, channels = StreamSummary(), StreamSummary()
    spiked = x.clone()
    spiked[0, [3, 9]] = 50.0
    tokens.add(0, stream_of(spiked))
    (first,) = tokens.to_json()["positions_99_9"]
    assert first == {"position": 0, "share": 1.0}
    assert tokens.to_json()["magnitude_99_9"] == 50.0
    for window in range(4):
        channels.add(window, stream_of(x.roll(7 * window, 0)))
    shares = [one["share"] for one in channels.to_json()["positions_99_9"]]
    assert len(shares) > 1
    assert max(shares) < 1


def test_an_imatrix_belongs_to_its_basis(tmp_path):
    """The file tells behind which rotations it was measured, and quantize takes it for no other model."""
    source, text = model("qwen3", tmp_path), windows()
    turned = [rotate(source, tmp_path / f"rotated-{seed}", RotateConfig(seed=seed)) for seed in (0, 1)]
    models = {"plain": source, "first": turned[0], "second": turned[1]}
    files = {}
    for name, each in models.items():
        calibrate(each, tmp_path / f"calib-{name}", CONFIG, text)
        files[name] = open_imatrix(tmp_path / f"calib-{name}" / "imatrix.gguf")
    assert files["plain"].basis is None
    assert files["first"].basis != files["second"].basis
    reasons = {
        ("plain", "first"): "on a rotated model, unlike",
        ("first", "plain"): "on a model that is not rotated, unlike",
        ("first", "second"): "behind other rotations than",
    }
    for (which, given), reason in reasons.items():
        with pytest.raises(RondelError, match=reason):
            prepare(models[which], QuantizeConfig("Q4_0"), files[given])
    for name, each in models.items():
        prepare(each, QuantizeConfig("Q4_0"), files[name])
