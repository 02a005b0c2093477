"""Checkpoint and statistics folders: what later stages read, what a fingerprint covers, and damaged folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.family import EMBEDDING, OUTPUT_NORM
from rondel.converters.folder import Packed
from rondel.converters.manifest import MANIFEST
from rondel.converters.output import StageOutput
from rondel.converters.stats import open_stats, site_tensor
from tests.tiny import FAMILIES, tiny_model

RECORD = {"name": "copy", "version": "1", "config": {}, "inputs": {}}


def copy_stage(source: Checkpoint, out: Path) -> Checkpoint:
    """The smallest stage: the same tensors, written shard by shard."""
    output = StageOutput(out, RECORD)
    for shard, names in source.shards().items():
        output.write(shard, {name: source.read(name) for name in names})
    manifest = source.carried() | {"stages": [*source.stages, output.stage]}
    output.finish(list(source.shards()), manifest, source.side_files())
    return open_checkpoint(out)


def copied(tmp_path: Path, family: str = "qwen3", **more: Any) -> Checkpoint:
    return copy_stage(open_checkpoint(tiny_model(family, tmp_path / "m", vocabulary=64, **more)), tmp_path / "c")


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_written_folder_behaves_as_its_hugging_face_source(family: str, tied: bool, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model(family, tmp_path / "m", tied=tied, dtype="bfloat16"))
    copy = copy_stage(source, tmp_path / "c")
    assert copy.names() == [name for names in source.shards().values() for name in names]
    assert (copy.numbers, copy.family, copy.head()) == (source.numbers, source.family, source.head())
    assert copy.shards() == source.shards()
    assert copy.side_files().keys() == source.side_files().keys()
    assert copy.carried() == source.carried() | {"stages": [RECORD]}
    for name in source.names():
        assert torch.equal(copy.read(name), source.read(name))
        assert copy.read_float(name).dtype == torch.float32
        assert (copy.info(name).shape, copy.info(name).format) == (source.info(name).shape, source.info(name).format)


def test_the_fingerprint_covers_contents_and_not_places(tmp_path: Path) -> None:
    one = copied(tmp_path / "a")
    two = copied(tmp_path / "b")
    assert one.fingerprint() == two.fingerprint()
    assert copied(tmp_path / "c", seed=1).fingerprint() != one.fingerprint()
    (two.root / "config.json").write_text("{}")
    assert two.fingerprint() != one.fingerprint()
    for key, value in (("rotations", [{}]), ("target", "rondel"), ("replication", {"x": 1}), ("hyperparameters", {})):
        assert Checkpoint(one.root, {**one.manifest, key: value}).fingerprint() != one.fingerprint()
    assert Checkpoint(one.root, {**one.manifest, "stages": []}).fingerprint() == one.fingerprint()


def test_packed_and_float_tensors_are_told_apart(tmp_path: Path) -> None:
    source = copied(tmp_path)
    out = StageOutput(tmp_path / "q", RECORD | {"name": "pack"})
    for shard, names in source.shards().items():
        tensors: dict[str, torch.Tensor | Packed] = {name: source.read(name) for name in names}
        if shard == "embedding":
            tensors[EMBEDDING] = Packed(torch.zeros(64 * 68, dtype=torch.uint8), "Q8_0", (64, 64))
        out.write(shard, tensors)
    out.finish(list(source.shards()), source.carried() | {"stages": [*source.stages, out.stage]})
    made = open_checkpoint(tmp_path / "q")
    assert made.quantized
    assert not source.quantized
    assert made.packed(EMBEDDING).shape == (64, 64)
    with pytest.raises(RondelError, match=r"token_embd\.weight is quantized \(Q8_0\)"):
        made.read(EMBEDDING)
    with pytest.raises(RondelError, match=r"output_norm\.weight is not packed bytes"):
        made.packed(OUTPUT_NORM)
    with pytest.raises(RondelError, match=r"there is no tensor blk\.9\.x"):
        made.read("blk.9.x")


RECORD = {"site": "residual", "kind": "hadamard", "online": False, "size": 64, "block": 64, "signs": "00" * 8}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m: m.update(manifest_version=2), "expected manifest version 1, got 2"),
        (lambda m: m.update(kind="stats"), "a model is needed here"),
        (lambda m: m.update(family="mamba"), "'mamba', rondel knows llama"),
        (lambda m: m.update(hyperparameters={"width": 1}), "damaged.*TypeError"),
        (lambda m: m["hyperparameters"].update(layers=1 << 40), "damaged.*sizes"),
        (lambda m: m["hyperparameters"].update(head_dim="16"), "damaged.*sizes"),
        (lambda m: m.update(rotations=[{"turn": 1}]), "damaged"),
        (lambda m: m.update(rotations=[RECORD | {"site": "nope"}]), "damaged.*nope_of_heads"),
        (
            lambda m: m.update(rotations=[RECORD | {"size": 128, "signs": "00" * 16}]),
            "damaged.*128 channels of residual",
        ),
        (lambda m: m.update(rotations=[RECORD | {"block": 12}]), "damaged.*in blocks of 12"),
        (lambda m: m.update(rotations=[RECORD | {"signs": "00"}]), "damaged.*signs"),
        (lambda m: m.update(tensors=[]), "tensors must be an object"),
        (lambda m: m.update(stages=["quantize"]), "stages must be a list of records"),
        (lambda m: m["tensors"].pop("output_norm.weight"), r"output_norm\.weight is missing"),
        (lambda m: m["tensors"]["output_norm.weight"].update(shape=[63]), r"is \[63\], expected \[64\]"),
        (lambda m: m["tensors"]["output_norm.weight"].update(shape=[-64]), r"output_norm\.weight is not described"),
        (lambda m: m["tensors"]["output_norm.weight"].pop("sha256"), r"output_norm\.weight is not described"),
        (lambda m: m["tensors"]["output_norm.weight"].update(shard="../m/x"), "expected a file of this folder"),
        (lambda m: m["tensors"].update({"blk.7.attn_q.weight": m["tensors"]["output_norm.weight"]}), r"blk\.7\.attn_q"),
    ],
)
def test_a_damaged_manifest_is_refused(
    change: Callable[[dict[str, Any]], object], sentence: str, tmp_path: Path
) -> None:
    folder = copied(tmp_path).root
    edit_manifest(folder, change)
    with pytest.raises(RondelError, match=sentence) as refusal:
        open_checkpoint(folder)
    assert "\n" not in str(refusal.value)


def test_a_shard_that_is_not_the_manifest_s_is_refused(tmp_path: Path) -> None:
    folder = copied(tmp_path).root
    edit_manifest(folder, lambda m: m["tensors"]["output_norm.weight"].update(format="F16"))
    with pytest.raises(RondelError, match=r"output_norm\.weight is F32 \[64\], the manifest says F16 \[64\]"):
        open_checkpoint(folder).read(OUTPUT_NORM)
    (folder / "output.safetensors").write_bytes(b"")
    with pytest.raises(RondelError, match=r"output\.safetensors: tensor output_norm\.weight cannot be read"):
        open_checkpoint(folder).read(OUTPUT_NORM)
    (folder / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(RondelError, match="not readable as a manifest"):
        open_checkpoint(folder)


def test_statistics_by_layer_and_site(tmp_path: Path) -> None:
    output = StageOutput(tmp_path / "stats", RECORD | {"name": "calibrate"})
    moment = torch.tensor([[4.0, 1.0], [1.0, 2.0]])
    block = {
        site_tensor(0, "attn_in", "second_moment"): moment,
        site_tensor(0, "attn_in", "diagonal"): moment.diagonal().clone(),
        site_tensor(0, "attn_in", "absmax"): torch.tensor([5.0, 3.0]),
        site_tensor(0, "attn_in", "count"): torch.tensor([7.0]),
    }
    output.write("blk-00000", block)
    output.write("output", {site_tensor(None, "output_in", "diagonal"): torch.ones(2)})
    manifest = {"kind": "stats", "stages": [output.stage], "source": {"name": "m", "sha256": "ab"}}
    output.finish(["blk-00000", "output"], manifest)
    stats = open_stats(tmp_path / "stats")
    assert torch.equal(stats.diagonal(0, "attn_in"), torch.tensor([4.0, 2.0]))
    found = stats.second_moment(0, "attn_in")
    assert found is not None
    assert torch.equal(found, moment)
    assert stats.absmax(0, "attn_in").tolist() == [5.0, 3.0]
    assert stats.count(0, "attn_in") == 7
    assert stats.second_moment(None, "output_in") is None
    assert stats.diagonal(None, "output_in").tolist() == [1.0, 1.0]
    assert (stats.rotations, stats.source["name"]) == ([], "m")
    with pytest.raises(RondelError, match="holds no diagonal of ffn_in in layer 0"):
        stats.diagonal(0, "ffn_in")
    with pytest.raises(RondelError, match="a model is needed here"):
        open_checkpoint(tmp_path / "stats")
    with pytest.raises(RondelError, match="statistics of rondel calibrate are needed"):
        open_stats(copied(tmp_path).root)
    with pytest.raises(RondelError, match="holds no statistics"):
        open_stats(tmp_path / "m")
