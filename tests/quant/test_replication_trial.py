"""Models with a teacher and text: the single copy tuned, copies fitted, all judged on text that fitted nothing."""

from __future__ import annotations

import math
import random
import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RegressionError, RondelError
from rondel.converters.export import ExportConfig, export
from rondel.converters.gguf_reader import GgufFile
from rondel.converters.replication import Replication
from rondel.converters.replication_keys import base_sha256, replicated_layers
from rondel.native import Model
from rondel.quant import replication_trial
from rondel.quant.judgement import Losses, split, token_losses
from rondel.quant.quantize import QuantizeConfig, quantize
from rondel.quant.replicate import NOT_FITTED, ReplicateConfig, build_replication, plan, replicate
from rondel.quant.replication_cost import copy_of_every_layer
from rondel.quant.rivals import Rival, Rivals
from rondel.quant.single_copy import Tuned
from rondel.quant.student import Student
from tests.tiny import tiny_model

CONTEXT = 64
CLOSED = 0.8  # of the gap to a planted teacher, as an honest fit of the right layer must
CONFIG = ReplicateConfig(("1:serial:1",), context=CONTEXT, steps=30, tokens=18_000)
TUNED = replace(CONFIG, layers=())
BETTER = 0.97  # of the divergence before: a fit that moved nothing stays at 1
FLOAT32_SUMS = 1e-5  # relative: the same model, read from the disk
HALF_FACTORS = 1e-3  # relative: the file's factors are float16, and those of B times the rank
EVAL = "rondel.replication.eval."


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(tiny_model("qwen3", tmp_path_factory.mktemp("tiny") / "m", layers=3))


@pytest.fixture(scope="module")
def teacher(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return replicate(source, tmp_path_factory.mktemp("teacher") / "t", ReplicateConfig(("1:serial:1:0.5",)))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    drawn = random.Random(5)
    path = tmp_path_factory.mktemp("text") / "letters.txt"
    path.write_text("".join(drawn.choice(string.ascii_letters + " ") for _ in range(20_000)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def quantized(source: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return quantize(source, tmp_path_factory.mktemp("quantized") / "q", QuantizeConfig("Q4_0", pure=True))


def losses_of(model: Checkpoint, teacher: Checkpoint, text: Path) -> dict[str, float]:
    windows = replication_trial.windows_of(model, (text,), CONFIG).windows
    return token_losses(Student(model), Student(teacher), split(windows, CONTEXT).confirm).told()


def sizes(folder: Checkpoint) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.root.glob("*.safetensors")}


def halves(file: GgufFile, name: str) -> torch.Tensor:
    entry = file.tensors[name]
    return torch.from_numpy(
        np.fromfile(file.path, "<f2", math.prod(entry.ne), offset=entry.offset).astype("float32")
    ).view(entry.ne[::-1])


def open_gates(student, teacher, windows, found, parameters, config, **running):
    """In the place of fit_copies: copies that surely harm a model that needs none."""
    return [{kind: torch.ones(1) for kind in one} for one in found.sets]


def closed_gates(student, teacher, windows, found, parameters, config, **running):
    """In the place of fit_copies: copies that change nothing."""
    return [{kind: torch.zeros(1) for kind in one} for one in found.sets]


def test_a_named_layer_is_fitted_and_judged(
    source: Checkpoint, teacher: Checkpoint, text: Path, tmp_path: Path
) -> None:
    made = replicate(source, tmp_path / "out", CONFIG, teacher, (text,))
    result, keys = made.stages[-1]["result"], made.manifest["replication"]
    assert result["kl"]["high"] < 0
    assert keys[EVAL + "kl_repl"] < (1 - CLOSED) * keys[EVAL + "kl_base"]
    assert keys[EVAL + "regression"] is False
    assert NOT_FITTED not in result["notes"]
    assert any("help" in note for note in result["notes"])
    written = export(made, tmp_path / "m.gguf", ExportConfig())
    assert written
    assert GgufFile(tmp_path / "m.gguf").keys[EVAL + "n_ctx"] == CONTEXT
    assert not Model(tmp_path / "m.gguf").warnings
    again = replicate(source, tmp_path / "again", CONFIG, teacher, (text,), threads=1)
    assert again.manifest["replication"] == keys


def test_copies_that_harm_are_refused_or_stamped(
    source: Checkpoint, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replication_trial, "fit_copies", open_gates)
    with pytest.raises(RegressionError, match=r"make the model worse.*--allow-regression"):
        replicate(source, tmp_path / "out", CONFIG, source, (text,))
    assert not any(tmp_path.iterdir())
    allowed = replace(CONFIG, allow_regression=True)
    made = replicate(source, tmp_path / "out", allowed, source, (text,))
    assert made.manifest["replication"][EVAL + "regression"] is True
    export(made, tmp_path / "m.gguf", ExportConfig())
    assert any("worse" in warning for warning in Model(tmp_path / "m.gguf").warnings)


def test_what_cannot_be_fitted_is_refused(source: Checkpoint, text: Path, tmp_path: Path) -> None:
    with pytest.raises(RondelError, match="--teacher"):
        replicate(source, tmp_path / "out", CONFIG, None, (text,))
    other = open_checkpoint(tiny_model("qwen3", tmp_path / "m", layers=1, vocabulary=320))
    with pytest.raises(RondelError, match="320 tokens"):
        replicate(source, tmp_path / "out", CONFIG, other, (text,))
    short = tmp_path / "short.txt"
    short.write_text("too little " * 50, encoding="utf-8")
    with pytest.raises(RondelError, match="give more --text"):
        replicate(source, tmp_path / "out", CONFIG, source, (short,))


def test_the_tuned_single_copy_is_what_is_written(
    source: Checkpoint, quantized: Checkpoint, text: Path, tmp_path: Path
) -> None:
    made = replicate(quantized, tmp_path / "out", TUNED, source, (text,))
    result = made.stages[-1]["result"]
    assert result["tuning"]["kl"]["high"] < 0
    assert result["losses"]["tuned"]["kl"] < BETTER * result["losses"]["input"]["kl"]
    assert any("tuned the single copy" in note for note in result["notes"])
    assert "replication" not in made.manifest
    changed = [name for name in made.names() if made.info(name).sha256 != quantized.info(name).sha256]
    assert "blk.1.ffn_down.weight" in changed
    assert "blk.0.attn_norm.weight" in changed
    for name in made.names():
        assert (made.info(name).format, made.info(name).shape) == (
            quantized.info(name).format,
            quantized.info(name).shape,
        )
    told = losses_of(made, source, text)
    assert told == pytest.approx(result["losses"]["tuned"], rel=FLOAT32_SUMS)
    again = replicate(quantized, tmp_path / "again", TUNED, source, (text,), threads=1)
    assert all(again.info(name).sha256 == made.info(name).sha256 for name in made.names())
    assert sizes(made) == sizes(quantized)


def test_without_tuning_every_tensor_is_shared(
    source: Checkpoint, quantized: Checkpoint, text: Path, tmp_path: Path
) -> None:
    config = replace(TUNED, tune=False)
    made = replicate(quantized, tmp_path / "out", config, source, (text,))
    assert "tuning" not in made.stages[-1]["result"]
    for name in made.names():
        assert (made.root / made.info(name).shard).samefile(quantized.root / quantized.info(name).shard)


def test_copies_stand_on_the_tuned_tensors(
    source: Checkpoint, quantized: Checkpoint, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replication_trial, "fit_copies", closed_gates)
    config = replace(TUNED, layers=("1:serial:1",))
    made = replicate(quantized, tmp_path / "out", config, source, (text,))
    keys, result = made.manifest["replication"], made.stages[-1]["result"]
    assert keys[EVAL + "kl_base"] == result["losses"]["tuned"]["kl"] < result["losses"]["input"]["kl"]
    hashes = {name: made.info(name).sha256 for name in made.names()}
    assert keys["rondel.replication.base.sha256"] == base_sha256(hashes, [1])
    (file,) = export(made, tmp_path / "m.gguf", ExportConfig())
    assert not Model(file).warnings


def test_tuning_that_harms_on_unseen_text_is_taken_back(
    source: Checkpoint, quantized: Checkpoint, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = torch.full_like(quantized.read("output_norm.weight"), 3)
    harmful = Tuned({"output_norm.weight": norm}, {"output_norm.weight": norm}, {"kept": True})
    monkeypatch.setattr(replication_trial, "tune", lambda *_, **__: harmful)
    made = replicate(quantized, tmp_path / "out", TUNED, source, (text,))
    assert made.stages[-1]["result"]["tuning"]["kept"] is False
    assert any("stays as it is" in note for note in made.stages[-1]["result"]["notes"])
    assert made.info("output_norm.weight").sha256 == quantized.info("output_norm.weight").sha256


def test_tuning_needs_a_teacher(source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(RondelError, match="--tune"):
        replicate(source, tmp_path / "out", ReplicateConfig(tune=True))


def test_rivals_of_copies_are_measured_beside_them(
    source: Checkpoint, quantized: Checkpoint, text: Path, tmp_path: Path
) -> None:
    config = replace(TUNED, layers=("1:serial:1",), tune=False)
    made = replicate(quantized, tmp_path / "out", config, source, (text,))
    keys, result = made.manifest["replication"], made.stages[-1]["result"]
    rivals = {one["name"]: one for one in result["rivals"]}
    assert set(rivals) == {"gains", "low rank", "more bits", "more bits, equal reads"}  # Q4_0 has no finer groups
    costs = result["costs"]
    width = source.numbers.width
    assert costs["bytes"] == 2 * (2 + 4 * width)
    assert costs["read"] == costs["bytes"] + sum(
        quantized.packed(name).data.numel()
        for name in quantized.names()
        if "blk.1" in name and quantized.info(name).packed
    )
    assert costs["compute"] == pytest.approx(1 / 3)
    assert 0 < rivals["low rank"]["bytes"] <= costs["bytes"]
    assert costs["bytes"] < rivals["more bits, equal reads"]["bytes"] <= costs["read"]
    base = result["losses"]["input"]["kl"]
    assert rivals["low rank"]["kl"] < base
    assert rivals["more bits, equal reads"]["kl"] < BETTER * base
    assert keys[EVAL + "rival_low_rank"] == rivals["low rank"]["kl"]
    # A third of the error's causes are gone with the larger formats; a copy of a layer repairs nothing of them.
    assert any("more bits, equal reads is better than the copies" in warning for warning in result["warnings"])


def test_a_correction_is_written_beside_the_tensors(
    source: Checkpoint, quantized: Checkpoint, text: Path, tmp_path: Path
) -> None:
    config = replace(TUNED, prefer="low-rank", tune=False)
    made = replicate(quantized, tmp_path / "out", config, source, (text,))
    told = made.stages[-1]["result"]["correction"]
    assert told["against"]["high"] < 0
    assert told["bytes"] <= copy_of_every_layer(quantized)
    assert "replication" not in made.manifest
    file = GgufFile(made.root / told["file"])
    assert file.keys["adapter.type"] == "lora"
    weights = {}
    for name in {entry.removesuffix(".lora_a").removesuffix(".lora_b") for entry in file.tensors}:
        a, b = (halves(file, name + suffix) for suffix in (".lora_a", ".lora_b"))
        weights[name] = Student(quantized).tensors[name] + b @ a / len(a)
    windows = replication_trial.windows_of(quantized, (text,), CONFIG).windows
    losses = token_losses(Student(quantized), Student(source), split(windows, CONTEXT).confirm, weights=weights)
    assert losses.told()["kl"] == pytest.approx(told["kl"], rel=HALF_FACTORS)


def test_a_preference_for_corrections_needs_a_teacher(source: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(RondelError, match="--prefer low-rank"):
        replicate(source, tmp_path / "out", ReplicateConfig(prefer="low-rank"))


def test_the_layer_that_runs_twice_is_found_and_written(
    source: Checkpoint, teacher: Checkpoint, text: Path, tmp_path: Path
) -> None:
    config = replace(CONFIG, layers=(), tune=False)
    made = replicate(source, tmp_path / "out", config, teacher, (text,))
    keys, result = made.manifest["replication"], made.stages[-1]["result"]
    assert replicated_layers(keys) == [1]
    assert keys[EVAL + "kl_repl"] < (1 - CLOSED) * keys[EVAL + "kl_base"]
    assert result["choice"]["against_gains"]["high"] < 0
    assert sum(entry["accepted"] for entry in result["log"]) == 1
    assert {entry["plan"][0].split(":")[1] for entry in result["log"]} == {"serial", "parallel"}
    (file,) = export(made, tmp_path / "m.gguf", ExportConfig())
    assert Model(file).steps() == 4


def test_none_is_the_tuned_single_copy(source: Checkpoint, quantized: Checkpoint, text: Path, tmp_path: Path) -> None:
    chosen = replicate(quantized, tmp_path / "auto", TUNED, source, (text,))
    tuned = replicate(quantized, tmp_path / "none", replace(TUNED, mode="none"), source, (text,))
    assert "replication" not in chosen.manifest
    assert "log" not in tuned.stages[-1]["result"]
    assert any("no layer is replicated" in note for note in chosen.stages[-1]["result"]["notes"])
    assert not any(entry["accepted"] for entry in chosen.stages[-1]["result"]["log"])
    for name in tuned.names():
        assert chosen.info(name).sha256 == tuned.info(name).sha256


def test_chosen_copies_make_room_for_a_better_use_of_their_bytes(
    source: Checkpoint, teacher: Checkpoint, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, layers=(), tune=False)
    perfect = build_replication(ReplicateConfig(("1:serial:1:0.5",)), source.numbers)

    class Better(Rivals):
        """One rival: the teacher's own path."""

        def against(self, found: Replication) -> dict[str, Callable[[], Rival | None]]:
            return {"the teacher": lambda: Rival("the teacher", 1, 1, {})}

    run = replication_trial.Trial.losses

    def losses(
        self: replication_trial.Trial, student: Student, found: Replication | None = None, weights: object = None
    ) -> Losses:
        return run(self, student, perfect if weights == {} else found, weights)

    monkeypatch.setattr(replication_trial, "Rivals", Better)
    monkeypatch.setattr(replication_trial.Trial, "losses", losses)
    left_out = replicate(source, tmp_path / "out", config, teacher, (text,))
    assert "replication" not in left_out.manifest
    result = left_out.stages[-1]["result"]
    assert any("the teacher is better than the copies" in warning for warning in result["warnings"])
    kept = replicate(source, tmp_path / "kept", replace(config, prefer="replicate"), teacher, (text,))
    assert replicated_layers(kept.manifest["replication"]) == [1]


def test_what_a_choice_cannot_be_is_refused(source: Checkpoint, text: Path, tmp_path: Path) -> None:
    for config, sentence in (
        (replace(CONFIG, mode="serial"), "--mode serial"),
        (replace(TUNED, candidates=(3,)), "layer 3 cannot have copies"),
    ):
        with pytest.raises(RondelError, match=sentence):
            replicate(source, tmp_path / "out", config, source, (text,))
        with pytest.raises(RondelError, match=sentence):
            plan(source, config, source, (text,))
    assert len(plan(source, replace(TUNED, candidates=(0,), mode="serial"), source, (text,))["candidates"]) == 3
    assert not any(tmp_path.iterdir())
