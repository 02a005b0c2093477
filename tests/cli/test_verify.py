"""`inspect`, `verify` and `export` on a tiny model: what they tell, and that no damage goes unseen."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from rondel.cli.main import app
from rondel.converters.errors import RondelError
from tests.tiny import tiny_model


def rondel(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("qwen3", tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def file(model: Path, tmp_path: Path) -> Path:
    done = rondel("export", model, "--type", "F16", "-o", tmp_path / "tiny.gguf", "--quiet")
    assert (done.exit_code, done.output) == (0, "")
    return tmp_path / "tiny.gguf"


def test_export_into_a_folder_names_the_file(model: Path, tmp_path: Path) -> None:
    done = rondel("export", model, "-o", f"{tmp_path}/new/", "--json")
    told = json.loads(done.stdout)
    assert [Path(name).parent for name in told["files"]] == [tmp_path / "new"]
    assert told["bytes"] == Path(told["files"][0]).stat().st_size


EVALUATION = {"nll_base": 2.75, "nll_repl": 2.5, "ci_lo": -0.5, "ci_hi": -0.25, "n_tokens": 4096, "regression": False}


@pytest.fixture
def measured(model: Path, tmp_path: Path) -> Path:
    """A folder with a copy of which something was measured."""
    done = rondel("replicate", model, "--layer", "1:serial:1", "-o", tmp_path / "copies", "--quiet")
    assert done.exit_code == 0, done.exception
    note(tmp_path / "copies", EVALUATION)
    return tmp_path / "copies"


def note(folder: Path, evaluation: dict[str, object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["replication"] |= {f"rondel.replication.eval.{name}": value for name, value in evaluation.items()}
    path.write_text(json.dumps(manifest))


def test_inspect_tells_what_was_measured_of_copies(measured: Path, tmp_path: Path) -> None:
    file = tmp_path / "measured.gguf"
    assert rondel("export", measured, "--type", "F16", "-o", file, "--quiet").exit_code == 0
    for path in (measured, file):
        told = json.loads(rondel("inspect", path, "--json").stdout)
        assert told["evaluation"] == EVALUATION
        assert told["replication"] == {"layer_1": {"type": "serial", "copies": 1, "shared_weight": True}}
        text = rondel("inspect", path).stdout.splitlines()
        assert ["evaluation.nll_repl", "2.5"] in [line.split() for line in text]


def test_inspect_is_silent_where_nothing_was_measured(file: Path) -> None:
    assert json.loads(rondel("inspect", file, "--json").stdout)["evaluation"] == {}
    assert "evaluation" not in rondel("inspect", file).stdout


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"nll_base": "low"}, r"eval\.nll_base: expected a float32 number"), ({"n_tokens": 0.5}, r"an unsigned integer")],
)
def test_inspect_refuses_what_was_measured_in_another_type(
    measured: Path, change: dict[str, object], sentence: str
) -> None:
    note(measured, change)
    done = rondel("inspect", measured)
    assert isinstance(done.exception, RondelError)
    assert re.search(sentence, str(done.exception))


def test_export_plan_tells_the_exact_size(model: Path, file: Path) -> None:
    planned = json.loads(rondel("export", model, "--type", "F16", "-o", file, "--dry-run", "--json").stdout)
    assert planned["files"] == [{"name": "tiny.gguf", "bytes": file.stat().st_size}]


@pytest.mark.parametrize("size", ["2X", "0", "-1G", "G", "1.5.2G"])
def test_export_refuses_a_size_that_is_none(model: Path, tmp_path: Path, size: str) -> None:
    done = rondel("export", model, "-o", tmp_path / "x.gguf", f"--split={size}")
    assert isinstance(done.exception, RondelError)
    assert size in str(done.exception)
    assert not any(tmp_path.iterdir())


def test_inspect_counts_the_bytes(file: Path) -> None:
    told = json.loads(rondel("inspect", file, "--json").stdout)
    assert told["keys"]["general.architecture"] == "qwen3"
    assert sum(row["bytes"] for row in told["types"].values()) == sum(t["bytes"] for t in told["tensors"])
    assert told["weights"] == sum(row["weights"] for row in told["types"].values())
    assert told["rotations"] == []
    text = rondel("inspect", file, "--tensors").stdout
    assert "blk.1.ffn_down.weight" in text
    assert "qwen3.block_count" in text


def test_inspect_of_no_model_is_a_sentence(tmp_path: Path) -> None:
    done = rondel("inspect", tmp_path)
    assert isinstance(done.exception, RondelError)
    assert "manifest.json" in str(done.exception)


def test_verify_accepts_what_export_wrote(model: Path, file: Path, tmp_path: Path) -> None:
    told = json.loads(rondel("verify", file, "--json").stdout)
    assert told["ok"]
    assert told["hashes_compared"] == told["tensors"]
    rondel("export", model, "-o", tmp_path / "parts.gguf", "--split", "60k", "--quiet")
    first = min(tmp_path.glob("parts-00001-of-*.gguf"))
    told = json.loads(rondel("verify", first, "--json").stdout)
    assert told["ok"]
    assert told["parts"] > 1
    assert told["hashes_compared"] == told["tensors"]


def test_verify_sees_one_flipped_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    last = max(json.loads(rondel("inspect", file, "--json").stdout)["tensors"], key=lambda tensor: tensor["offset"])
    data[last["offset"]] ^= 1
    file.write_bytes(data)
    done = rondel("verify", file, "--json")
    told = json.loads(done.stdout)
    assert (told["ok"], len(told["failures"])) == (False, 1)
    assert last["name"] in told["failures"][0]
    assert isinstance(done.exception, RondelError)


def test_verify_sees_a_scale_that_is_not_finite(file: Path) -> None:
    tensors = json.loads(rondel("inspect", file, "--json").stdout)["tensors"]
    norm = next(tensor for tensor in tensors if tensor["name"] == "blk.0.attn_norm.weight")
    data = bytearray(file.read_bytes())
    data[norm["offset"] : norm["offset"] + 4] = b"\x00\x00\xc0\x7f"  # an F32 that is not a number
    file.write_bytes(data)
    failures = json.loads(rondel("verify", file, "--json").stdout)["failures"]
    assert len(failures) == 2, "the value and the hash"
    assert all("blk.0.attn_norm.weight" in failure for failure in failures)


@pytest.mark.parametrize("change", [-1, +33])
def test_verify_sees_a_wrong_length(file: Path, change: int) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:change] if change < 0 else data + bytes(change))
    assert rondel("verify", file).exception is not None


@pytest.mark.parametrize("quantized", [True, False])
def test_verify_binds_copies_to_their_weights(model: Path, tmp_path: Path, quantized: bool) -> None:
    source, folder, file = model, tmp_path / "replicated", tmp_path / "model.gguf"
    if quantized:
        source = tmp_path / "quantized"
        rondel("quantize", model, "--type", "Q4_0", "-o", source, "--quiet")
    rondel("replicate", source, "--layer", "1:serial:1", "-o", folder, "--quiet")

    def failures() -> list[list[str]]:
        rondel("export", folder, *([] if quantized else ["--type", "F16"]), "-o", file, "--quiet", "--force")
        return [json.loads(rondel("verify", path, "--json").stdout)["failures"] for path in (folder, file)]

    assert failures() == [[], []]
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["replication"]["rondel.replication.base.sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    of_folder, of_file = failures()
    assert "made for other weights of layers 1" in of_folder[0]
    assert of_file == (of_folder if quantized else []), "export to F16 changes the bytes, and nobody can tell"


def test_matrices_of_rotations_are_shown_verified_and_run(model: Path, tmp_path: Path) -> None:
    rotated, file = tmp_path / "rotated", tmp_path / "tiny.gguf"
    done = rondel("rotate", model, "--kind", "orthogonal", "--tries", 2, "-o", rotated, "--quiet")
    assert done.exit_code == 0, done.exception
    records = json.loads(rondel("inspect", rotated, "--json").stdout)["rotations"]
    assert [record["kind"] for record in records] == ["orthogonal", "orthogonal"]
    for step in (["export", rotated, "-o", file], ["verify", file, "--manifest", rotated], ["verify", rotated]):
        done = rondel(*step, "--quiet")
        assert done.exit_code == 0, (step[0], done.exception)
    shown = json.loads(rondel("inspect", file, "--json").stdout)["rotations"]
    assert [one["sha256"] for one in shown] == [record["sha256"] for record in records]
    assert rondel("run", file, "-p", "once", "-n", 2, "--quiet").exit_code == 0
    # One bit of a matrix: the weights cannot be turned back with it.
    stored = bytearray((rotated / "rotations.safetensors").read_bytes())
    stored[-1] ^= 1
    (rotated / "rotations.safetensors").write_bytes(stored)
    done = rondel("verify", rotated)
    assert "rotation.1: its bytes in rotations.safetensors differ" in str(done.exception)


def test_a_type_that_export_cannot_make_names_the_command_that_can(model: Path, tmp_path: Path) -> None:
    done = rondel("export", model, "--type", "Q4_K", "-o", tmp_path / "x.gguf")
    assert isinstance(done.exception, RondelError)
    assert str(done.exception) == ("--type Q4_K: expected F16, F32 or BF16; other types are made by `rondel quantize`")
