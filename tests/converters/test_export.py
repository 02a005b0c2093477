"""Exported files: every key and tensor as the gguf package reads them, whole or absent, the same bytes each time."""

from __future__ import annotations

import errno
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import quantize

from rondel.converters.checkpoint import Checkpoint, open_checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.export import ExportConfig, export, plan
from rondel.converters.folder import Packed
from rondel.converters.gguf_keys import General, Rondel
from rondel.converters.output import StageOutput
from rondel.converters.rotation import Rotation
from rondel.quant.quantize import QuantizeConfig
from rondel.quant.quantize import quantize as quantize_checkpoint
from tests.tiny import tiny_model

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "tests/models/stories-4m"

# What llama.cpp's converter wrote for the demo model with --outtype f16: everything but the tokenizer.
DEMO_KEYS = {
    "general.architecture": "qwen3",
    "general.type": "model",
    "general.name": "Stories 4m",
    "general.basename": "stories",
    "general.size_label": "4M",
    "qwen3.block_count": 4,
    "qwen3.context_length": 512,
    "qwen3.embedding_length": 256,
    "qwen3.feed_forward_length": 768,
    "qwen3.attention.head_count": 4,
    "qwen3.attention.head_count_kv": 2,
    "qwen3.rope.freq_base": 10000.0,
    "qwen3.attention.layer_norm_rms_epsilon": float(np.float32(1e-6)),
    "qwen3.attention.key_length": 64,
    "qwen3.attention.value_length": 64,
    "general.file_type": 1,
    "general.quantization_version": 2,
}

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PEER_ROUNDING = 2e-3  # of the largest logit: llama.cpp keeps keys and values in float16


def read(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return keys, {tensor.name: tensor for tensor in reader.tensors}


def tiny(folder: Path, family: str = "llama", **more: Any) -> Checkpoint:
    return open_checkpoint(tiny_model(family, folder, **more))


def quantized(source: Checkpoint, out: Path, kind: str, **manifest: Any) -> Checkpoint:
    """A checkpoint as the quantize stage leaves it: feed-forward matrices packed, the rest as it was."""
    stage = {"name": "quantize", "version": "0", "config": {"type": kind}, "inputs": {}}
    output = StageOutput(out, stage)
    random = np.random.default_rng(0)
    for shard, names in source.shards().items():
        tensors: dict[str, torch.Tensor | Packed] = {}
        for name in names:
            tensors[name] = source.read(name)
            rows, columns = (*source.info(name).shape, 1)[:2]
            if ".ffn_" not in name or columns == 1:
                continue
            if kind.startswith("U"):
                bits, group = int(kind[1]), int(kind.split("-")[1])
                padded = -(-rows // 16) * 16
                data = random.integers(0, 256, padded * (columns * bits // 8 + columns // group * 2), np.uint8)
            else:
                data = quantize(source.read(name).float().numpy(), gguf.GGMLQuantizationType[kind]).reshape(-1)
            tensors[name] = Packed(torch.from_numpy(data), kind, (rows, columns))
        output.write(shard, tensors)
    output.finish(list(source.shards()), {**source.carried(), "stages": [stage], **manifest}, source.side_files())
    return open_checkpoint(out)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_tensor_is_read_back(tmp_path: Path, family: str) -> None:
    source = tiny(tmp_path / "model", family)
    (path,) = export(source, tmp_path / "f.gguf", ExportConfig(type="F32"))
    _, tensors = read(path)
    assert list(tensors) == source.names()
    for name, tensor in tensors.items():
        assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
        assert np.array_equal(tensor.data, source.read(name).numpy()), name


@pytest.mark.parametrize("wanted", ["F16", "BF16"])
def test_matrices_get_the_type_and_the_rest_stays_f32(tmp_path: Path, wanted: str) -> None:
    source = tiny(tmp_path / "model", "qwen3", tied=True)
    (path,) = export(source, tmp_path / "f.gguf", ExportConfig(type=wanted))
    _, tensors = read(path)
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[wanted]
    for name, tensor in tensors.items():
        expected = source.read(name).to(dtype if source.read(name).dim() == 2 else torch.float32)
        assert tensor.tensor_type.name == (wanted if expected.dim() == 2 else "F32")
        assert tensor.data.tobytes() == expected.view(torch.uint8).numpy().tobytes(), name


def test_metadata_is_that_of_llama_cpps_converter(tmp_path: Path) -> None:
    (path,) = export(open_checkpoint(DEMO), tmp_path, ExportConfig(type="F16"))
    assert path.name == "stories-4M-F16.gguf"
    keys, _ = read(path)
    plain = {key: value for key, value in keys.items() if not key.startswith(("tokenizer.", "rondel."))}
    assert plain == DEMO_KEYS
    assert list(plain)[:4] == list(DEMO_KEYS)[:4]
    assert keys["rondel.source.name"] == "stories-4m"


def test_the_stored_type_is_kept_without_a_wish(tmp_path: Path) -> None:
    source = tiny(tmp_path / "model", dtype="bfloat16")
    (path,) = export(source, tmp_path / "f.gguf", ExportConfig())
    keys, tensors = read(path)
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == "BF16"
    assert keys[General.FILE_TYPE] == gguf.LlamaFileType.MOSTLY_BF16


def test_linear_rope_scaling_and_odd_head_sizes_are_told(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    source = tiny(tmp_path / "model", "qwen2", rope_parameters=scaling)
    keys, _ = read(export(source, tmp_path / "f.gguf", ExportConfig())[0])
    assert (keys["qwen2.rope.scaling.type"], keys["qwen2.rope.scaling.factor"]) == ("linear", 2.0)
    assert keys["qwen2.rope.freq_base"] == 500.0
    assert "qwen2.attention.key_length" not in keys


def test_the_hashes_in_the_file_are_those_of_its_tensors(tmp_path: Path) -> None:
    keys, tensors = read(export(tiny(tmp_path / "model"), tmp_path / "f.gguf", ExportConfig())[0])
    hashes = keys[Rondel.TENSOR_SHA256]
    found = [hashlib.sha256(tensor.data.tobytes()).hexdigest() for tensor in tensors.values()]
    assert [hashes[64 * i : 64 * i + 64] for i in range(len(hashes) // 64)] == found


def test_a_packed_file_keeps_the_first_digits_of_its_hashes(tmp_path: Path) -> None:
    packed = quantize_checkpoint(tiny(tmp_path / "model"), tmp_path / "packed", QuantizeConfig(type="Q8_0"))
    keys, tensors = read(export(packed, tmp_path / "f.gguf", ExportConfig())[0])
    found = [hashlib.sha256(tensor.data.tobytes()).hexdigest()[:16] for tensor in tensors.values()]
    assert keys[Rondel.TENSOR_SHA256] == "".join(found)


def test_two_exports_are_identical_and_the_plan_is_exact(tmp_path: Path) -> None:
    source = tiny(tmp_path / "model")
    first, second = (tmp_path / name for name in ("a.gguf", "b.gguf"))
    for path in (first, second):
        planned = plan(source, path, ExportConfig(type="F16"))
        export(source, path, ExportConfig(type="F16"))
        assert planned["files"] == [{"name": path.name, "bytes": path.stat().st_size}]
    assert first.read_bytes() == second.read_bytes()
    assert str(tmp_path).encode() not in first.read_bytes()


def test_an_existing_file_is_kept_or_refused_or_replaced(tmp_path: Path) -> None:
    source = tiny(tmp_path / "model")
    path = tmp_path / "f.gguf"
    export(source, path, ExportConfig(type="F16"))
    before = path.stat().st_mtime_ns
    export(source, path, ExportConfig(type="F16"))
    assert path.stat().st_mtime_ns == before
    with pytest.raises(RondelError, match="--force"):
        export(source, path, ExportConfig(type="F32"))
    export(source, path, ExportConfig(type="F32"), force=True)
    assert read(path)[0][General.FILE_TYPE] == gguf.LlamaFileType.ALL_F32
    path.write_bytes(b"something else")
    with pytest.raises(RondelError, match="--force"):
        export(source, path, ExportConfig(type="F32"))


def test_a_split_model_has_the_same_tensors(tmp_path: Path) -> None:
    source = tiny(tmp_path / "model")
    whole_keys, whole = read(export(source, tmp_path / "f.gguf", ExportConfig())[0])
    limit = 50_000
    paths = export(source, tmp_path / "f.gguf", ExportConfig(split=limit))
    assert len(paths) > 2
    assert [path.name for path in paths] == [f"f-{i + 1:05d}-of-{len(paths):05d}.gguf" for i in range(len(paths))]
    found = {}
    for number, path in enumerate(paths):
        reader = gguf.GGUFReader(path)
        keys, tensors = read(path)
        assert (keys["split.no"], keys["split.count"], keys["split.tensors.count"]) == (number, len(paths), len(whole))
        assert reader.fields["split.no"].types == [gguf.GGUFValueType.UINT16]
        assert reader.fields["split.tensors.count"].types == [gguf.GGUFValueType.INT32]
        assert (General.ARCHITECTURE in keys) == (number == 0)
        assert len(tensors) == 1 or sum(tensor.n_bytes for tensor in tensors.values()) <= limit
        found |= tensors
    assert list(found) == list(whole)
    assert all(found[name].data.tobytes() == whole[name].data.tobytes() for name in whole)
    assert read(paths[0])[0]["tokenizer.ggml.tokens"] == whole_keys["tokenizer.ggml.tokens"]


def test_packed_tensors_keep_their_bytes(tmp_path: Path) -> None:
    source = quantized(tiny(tmp_path / "model"), tmp_path / "quantized", "Q8_0")
    keys, tensors = read(export(source, tmp_path / "f.gguf", ExportConfig())[0])
    assert keys[General.ARCHITECTURE] == "llama"
    assert keys[General.FILE_TYPE] == gguf.LlamaFileType.MOSTLY_Q8_0
    down = tensors["blk.1.ffn_down.weight"]
    assert (down.tensor_type.name, list(down.shape)) == ("Q8_0", [96, 64])
    assert down.data.tobytes() == source.packed("blk.1.ffn_down.weight").data.numpy().tobytes()


def test_extended_formats_make_a_rondel_file(tmp_path: Path) -> None:
    model = tiny(tmp_path / "model", hidden=128, width=128)
    source = quantized(model, tmp_path / "quantized", "U4-128", target="rondel")
    path = tmp_path / "f.gguf"
    keys, tensors = read(export(source, path, ExportConfig())[0])
    assert (keys[General.ARCHITECTURE], keys[Rondel.BASE_ARCHITECTURE]) == ("rondel", "llama")
    assert keys[Rondel.REQUIRES] == ["tile-1"]
    assert keys[General.ALIGNMENT] == 64
    assert General.FILE_TYPE not in keys
    assert keys["llama.block_count"] == 2
    names = keys[Rondel.TENSOR_NAME]
    assert names == [name for name in source.names() if source.info(name).packed]
    assert keys[Rondel.TENSOR_FORMAT] == ["U4-128"] * len(names)
    assert keys[Rondel.TENSOR_SHAPE] == [128, 128, 1, 1] * len(names)
    for name in names:
        assert tensors[name].tensor_type.name == "I8"
        assert tensors[name].data_offset % 64 == 0
        assert tensors[name].data.tobytes() == source.packed(name).data.numpy().tobytes()
    with pytest.raises(RondelError, match="tile-1"):
        export(source, tmp_path / "g.gguf", ExportConfig(target="llama.cpp"))


def test_rotations_are_recorded_and_online_ones_need_rondel(tmp_path: Path) -> None:
    fused = Rotation("residual", "hadamard", False, 64, 64, "ff" * 8)
    online = Rotation("hidden", "hadamard", True, 96, 32, "0f" * 12, (1,))
    model = tiny(tmp_path / "model")
    source = quantized(model, tmp_path / "fused", "Q8_0", rotations=[fused.to_json()])
    keys, _ = read(export(source, tmp_path / "f.gguf", ExportConfig())[0])
    assert keys[General.ARCHITECTURE] == "llama"
    assert (keys[Rondel.ROTATION_COUNT], keys["rondel.rotation.0.site"]) == (1, "residual")
    assert keys["rondel.rotation.0.signs"] == [255] * 8
    source = quantized(model, tmp_path / "online", "Q8_0", rotations=[fused.to_json(), online.to_json()])
    keys, _ = read(export(source, tmp_path / "g.gguf", ExportConfig())[0])
    assert (keys[General.ARCHITECTURE], keys[Rondel.REQUIRES]) == ("rondel", ["hadamard-1"])
    assert (keys["rondel.rotation.1.online"], keys["rondel.rotation.1.layers"]) == (True, [1])


def test_a_fused_matrix_is_told_by_its_hash_and_runs_everywhere(tmp_path: Path) -> None:
    dense = Rotation("residual", "orthogonal", False, 64, 64, seed=3, sha256="0123456789abcdef" * 4)
    source = quantized(tiny(tmp_path / "model"), tmp_path / "fused", "Q8_0", rotations=[dense.to_json()])
    keys, _ = read(export(source, tmp_path / "f.gguf", ExportConfig())[0])
    assert keys[General.ARCHITECTURE] == "llama"
    found = {key.removeprefix("rondel.rotation.0."): keys[key] for key in keys if key.startswith("rondel.rotation.0.")}
    told = {"site": "residual", "kind": "orthogonal", "online": False, "size": 64, "block": 64}
    assert found == {**told, "sha256": dense.sha256}


def test_replication_keys_have_their_exact_types(tmp_path: Path) -> None:
    record = {"version": [1, 0, 0], "strict": False, "step.layer": [0, 1], "step.pass": [0, 0], "step.kv": [0, -1]}
    record |= {"payload": "", "eval.nll_base": 1.5}
    source = quantized(tiny(tmp_path / "model"), tmp_path / "replicated", "Q8_0", replication=record)
    fields = gguf.GGUFReader(export(source, tmp_path / "f.gguf", ExportConfig())[0]).fields
    kinds = {name: fields[f"rondel.replication.{name}"].types[-1].name for name in record}
    assert kinds == {
        "version": "UINT32",
        "strict": "BOOL",
        "step.layer": "UINT32",
        "step.pass": "UINT8",
        "step.kv": "INT32",
        "payload": "STRING",
        "eval.nll_base": "FLOAT32",
    }
    assert fields[General.ARCHITECTURE].contents() == "llama"
    strict = quantized(
        tiny(tmp_path / "model"), tmp_path / "strict", "Q8_0", replication=record | {"strict": True}, target="rondel"
    )
    assert read(export(strict, tmp_path / "g.gguf", ExportConfig())[0])[0][Rondel.REQUIRES] == ["replication-1"]


def test_values_beyond_f16_are_refused_by_name(tmp_path: Path) -> None:
    import safetensors.torch as safe

    tiny(tmp_path / "model")
    weights = safe.load_file(tmp_path / "model/model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    safe.save_file(weights, tmp_path / "model/model.safetensors", {"format": "pt"})
    with pytest.raises(RondelError, match=r"blk\.1\.ffn_up\.weight: the value 100000"):
        export(open_checkpoint(tmp_path / "model"), tmp_path / "f.gguf", ExportConfig(type="F16"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ExportConfig(type="Q4_K"), "rondel quantize"),
        (ExportConfig(type="F16"), "is quantized"),
        (ExportConfig(target="phone"), "expected llama.cpp or rondel"),
        (ExportConfig(split=0), "positive number of bytes"),
    ],
)
def test_settings_that_cannot_apply_are_refused(tmp_path: Path, config: ExportConfig, words: str) -> None:
    source = quantized(tiny(tmp_path / "model"), tmp_path / "quantized", "Q8_0")
    with pytest.raises(RondelError, match=words):
        plan(source, tmp_path / "f.gguf", config)


def test_a_name_replaces_the_folders(tmp_path: Path) -> None:
    source = tiny(tmp_path / "model")
    (path,) = export(source, tmp_path, ExportConfig(type="F16", name="My-Model-100K-Chat-v2"))
    assert path.name == "My-Model-100K-Chat-v2-F16.gguf"
    keys, _ = read(path)
    assert (keys[General.NAME], keys[General.BASENAME], keys[General.FINETUNE], keys[General.VERSION]) == (
        "My-Model-100K-Chat-v2",
        "My-Model",
        "Chat",
        "v2",
    )


CARD = """---
license: apache-2.0
language: [en]
tags: [text-generation, 3]
---
# A model
"""


def test_licence_and_sampling_defaults_travel_through_the_chain(tmp_path: Path) -> None:
    model = tiny_model("llama", tmp_path / "model")
    (model / "README.md").write_text(CARD)
    (model / "generation_config.json").write_text('{"temperature": 0.5, "top_k": 20, "top_p": "much"}')
    source = quantized(open_checkpoint(model), tmp_path / "quantized", "Q8_0")
    keys, _ = read(export(source, tmp_path / "f.gguf", ExportConfig())[0])
    assert (keys["general.license"], keys["general.languages"]) == ("apache-2.0", ["en"])
    assert (keys["general.sampling.temp"], keys["general.sampling.top_k"]) == (0.5, 20)
    assert "general.sampling.top_p" not in keys
    assert "general.tags" not in keys


@pytest.mark.parametrize(
    "card", ["---\n{[\n---\n", "---\nbase_model: 3\ndatasets: {a: 1}\nlicense: [1]\n---\n", "---\n- a\n---"]
)
def test_a_model_card_of_any_shape_does_not_stop_the_export(tmp_path: Path, card: str) -> None:
    model = tiny_model("llama", tmp_path / "model")
    (model / "README.md").write_text(card)
    (path,) = export(open_checkpoint(model), tmp_path / "f.gguf", ExportConfig())
    assert read(path)[0][General.NAME] == "Model"


KILLED = """
import os, signal, sys
from pathlib import Path
from rondel.converters.checkpoint import open_checkpoint
from rondel.converters.export import ExportConfig, export

def die(done, total, what):
    if done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

export(open_checkpoint(Path(sys.argv[1])), Path(sys.argv[2]), ExportConfig(split=50_000), progress=die)
"""


def test_a_killed_export_leaves_no_file_and_does_not_disturb_the_next(tmp_path: Path) -> None:
    source = tiny(tmp_path / "model")
    for done in (3, len(source.names())):
        arguments = [str(tmp_path / "model"), str(tmp_path / "f.gguf"), str(done)]
        assert subprocess.run([sys.executable, "-c", KILLED, *arguments], check=False).returncode == -9
        assert not list(tmp_path.glob("*.gguf"))
    paths = export(source, tmp_path / "f.gguf", ExportConfig(split=50_000))
    assert sorted(path.name for path in tmp_path.glob("f*")) == [path.name for path in paths]


def test_parts_of_an_export_that_was_killed_while_renaming_are_completed(tmp_path: Path) -> None:
    source = tiny(tmp_path / "model")
    paths = export(source, tmp_path / "f.gguf", ExportConfig(split=50_000))
    contents = [path.read_bytes() for path in paths]
    paths[0].unlink()
    assert export(source, tmp_path / "f.gguf", ExportConfig(split=50_000)) == paths
    assert [path.read_bytes() for path in paths] == contents


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny(tmp_path / "model")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rondel.converters.gguf_writer.os.fsync", full)
    with pytest.raises(RondelError, match=r"f\.gguf: cannot be written \(No space left"):
        export(source, tmp_path / "f.gguf", ExportConfig())
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_plan_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny(tmp_path / "model")
    monkeypatch.setattr("rondel.converters.weights.Weights.read", None)
    assert plan(source, tmp_path / "f.gguf", ExportConfig(type="BF16"))["encoding"] == "BF16"


@pytest.mark.peer
def test_llama_cpp_loads_the_demo_model(tmp_path: Path) -> None:
    from tests.peer.llama import Llama, find_library

    if find_library() is None:
        pytest.skip("llama.cpp is not installed (extra `peer`)")
    (path,) = export(open_checkpoint(DEMO), tmp_path, ExportConfig(type="F16"))
    with Llama(path) as model:
        tokens = model.tokenize("Once upon a time, there was a little girl")
        assert len(model.greedy(tokens, 8)) == 8


@pytest.mark.peer
@pytest.mark.parametrize(
    ("family", "model", "split"),
    [
        ("llama", {"rope_parameters": LLAMA3_SCALING}, None),
        ("llama", {"attention_bias": True, "head_dim": 32}, 40_000),
        ("qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}, None),
        ("qwen3", {"tied": True}, 30_000),
    ],
)
def test_llama_cpp_computes_what_the_checkpoint_says(
    tmp_path: Path, family: str, model: dict[str, Any], split: int | None
) -> None:
    """Biases, RoPE scaling, head sizes and splits reach llama.cpp: its logits are those of the float64 reference."""
    from rondel.quant.reference import reference_logits
    from tests.peer.llama import Llama, find_library

    if find_library() is None:
        pytest.skip("llama.cpp is not installed (extra `peer`)")
    source = tiny(tmp_path / "model", family, **model)
    paths = export(source, tmp_path / "f.gguf", ExportConfig(type="F32", split=split))
    tokens = [3, 5, 7, 11, 13, 200, 40]
    with Llama(paths[0], context=64, threads=1) as peer:
        logits = peer.eval(tokens)
    expected = reference_logits(source, torch.tensor(tokens)).numpy().reshape(logits.shape)
    assert np.abs(logits - expected).max() <= PEER_ROUNDING * np.abs(expected).max()
