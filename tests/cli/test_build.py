"""`rondel build`: recipes are checked before work begins, finished work is kept, and a killed build ends the same."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from rondel.cli.main import app
from rondel.cli.recipe import load_recipe
from rondel.converters.errors import RondelError
from tests.tiny import tiny_model

KILLS, SEED = 10, "1"
RECIPE = """
[model]
path = "tiny"

[calibrate]
text = ["text.txt"]
tokens = 512
context = 64

[rotate]

[quantize]
type = "Q4_K_M"

[replicate]
layers = ["1:serial:1"]

[export]
split = 60000
"""
# Imports once and forks for every attempt: a build of a tiny model takes less time than importing torch.
KILLER = """
import json, os, random, signal, sys, time
import rondel.cli.build, rondel.cli.recipe
from rondel.cli.main import app
rondel.cli.recipe.section_types()
import rondel.converters.huggingface, transformers
from transformers import AutoModelForCausalLM

arguments, kills, seed = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def start():
    child = os.fork()
    if child == 0:
        try:
            app(arguments, prog_name="rondel")
        except SystemExit as end:
            os._exit(end.code or 0)
        except BaseException:
            import traceback
            traceback.print_exc()
        os._exit(1)
    return child

chance, hits, longest = random.Random(seed), 0, 1.0
for attempt in range(kills):
    child = start()
    time.sleep(chance.uniform(0.05, longest))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    hits += os.WIFSIGNALED(status)
    if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status):
        sys.exit(f"attempt {attempt} failed by itself")
status = os.waitpid(start(), 0)[1]
print(hits)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def rondel(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with its model and its text."""
    folder = tmp_path_factory.mktemp("build")
    tiny_model("qwen3", folder / "tiny", layers=3)
    words = random.Random(0)
    text = " ".join(words.choice(["the", "cat", "on", "once", "water", "in", "a", "then"]) for _ in range(2000))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    done = rondel("build", folder / "recipe.toml", "-o", folder / "undisturbed", "--threads", 1, "--json")
    assert done.exit_code == 0, done.exception
    told = json.loads(done.stdout)
    assert [stage["command"] for stage in told["stages"][:4]] == ["calibrate", "rotate", "quantize", "replicate"]
    assert len(told["files"]) > 1
    assert all(Path(file).is_file() for file in told["files"])
    return folder / "undisturbed"


def test_a_killed_build_ends_with_the_same_bytes(folder: Path, undisturbed: Path) -> None:
    out = folder / "killed"
    arguments = ["build", str(folder / "recipe.toml"), "-o", str(out), "--threads", "2", "--quiet"]
    command = [sys.executable, "-c", KILLER, json.dumps(arguments), str(KILLS), SEED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, "no attempt was killed: the test proves nothing"
    found, expected = contents(out), contents(undisturbed)
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


def test_a_finished_build_is_left_alone(folder: Path, undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    assert rondel("build", folder / "recipe.toml", "-o", undisturbed, "--quiet").exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()} == before


def test_the_file_holds_the_recipe_it_was_made_by(folder: Path, undisturbed: Path) -> None:
    first = min(undisturbed.glob("*-00001-of-*.gguf"))
    text = json.loads(rondel("inspect", first, "--json").stdout)["keys"]["rondel.recipe"]
    assert str(folder) not in text
    kept = tomllib.loads(text)
    assert kept["calibrate"]["text"] == ["text.txt"]
    assert kept["export"] == {"split": 60000, "materialize": False}
    (folder / "kept.toml").write_text(text, encoding="utf-8")
    again = load_recipe(folder / "kept.toml", model=folder / "tiny")
    assert again.sections == load_recipe(folder / "recipe.toml").sections


def test_another_setting_needs_force(folder: Path, undisturbed: Path, tmp_path: Path) -> None:
    changed = ("--set", "quantize.type=Q8_0")
    done = rondel("build", folder / "recipe.toml", "-o", undisturbed, *changed, "--quiet")
    assert isinstance(done.exception, RondelError)
    assert "--force" in str(done.exception)


def test_a_recipe_may_give_a_budget_of_bytes(folder: Path, tmp_path: Path) -> None:
    """The recipe's own text, which the file holds, is counted: it is long enough to matter."""
    most = 130_000
    text = RECIPE.replace('type = "Q4_K_M"', f'size = {most}\nmethod = "imatrix"').replace("split = 60000", "")
    text = text.replace('[replicate]\nlayers = ["1:serial:1"]\n', "") + f'[run]\nprompt = "{"once " * 1000}"\n'
    (folder / "budget.toml").write_text(text, encoding="utf-8")
    arguments = ("build", folder / "budget.toml", "-o", tmp_path)
    planned = json.loads(rondel(*arguments, "--dry-run", "--json").stdout)["quantize"]
    assert (planned["config"]["size"], "bytes" in planned) == (most, False)
    done = rondel(*arguments, "--json")
    assert done.exit_code == 0, done.exception
    (file,) = json.loads(done.stdout)["files"]
    budget = json.loads((tmp_path / "quantized" / "manifest.json").read_text(encoding="utf-8"))["quantization"][
        "budget"
    ]
    assert Path(file).stat().st_size == budget["file_bytes"] <= most


def test_rotating_is_decided_for_what_the_recipe_makes(folder: Path) -> None:
    def wanted(*changes: str) -> str:
        return load_recipe(folder / "recipe.toml", changes).sections["rotate"].type

    assert wanted() == "Q4_K_M"
    assert wanted("quantize.type=Q2_K") == "Q2_K"
    assert wanted("quantize.type=Q2_K", "rotate.type=Q4_0") == "Q4_0"
    assert wanted("quantize.like=IQ2_M", "quantize.type=Q2_K") == "Q2_K"


def test_a_build_tells_what_it_decided(undisturbed: Path, folder: Path) -> None:
    done = rondel("build", folder / "recipe.toml", "-o", undisturbed, "--json")
    told = json.loads(done.stdout)["stages"][1]
    assert told["choice"]["type"] == "Q4_K_M"
    assert "rotate" in told["choice"]["tensors"][-1]


@pytest.mark.parametrize("method", ["gptq", "awq", "smoothquant+rtn"])
def test_a_recipe_may_name_a_method_that_needs_statistics(folder: Path, tmp_path: Path, method: str) -> None:
    change = ("--set", f"quantize.method={method}")
    done = rondel("build", folder / "recipe.toml", "-o", tmp_path / "out", *change, "--dry-run", "--json")
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["quantize"]["config"]["method"] == method


def test_dry_run_writes_nothing(folder: Path, tmp_path: Path) -> None:
    done = rondel("build", folder / "recipe.toml", "-o", tmp_path / "out", "--dry-run", "--json")
    told = json.loads(done.stdout)
    assert told["calibrate"]["tokens"] == 512
    assert told["export"]["split"] == 60000
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("quantize.typ=Q4_K_M", "unknown key 'typ'; known keys: type, bpw"),
        ("quantise.type=Q4_K_M", "unknown section [quantise]; known sections: model, calibrate"),
        ("quantize.type=Q4_X", "Q4_X"),
        ("quantize.method=best", "best"),
        ("quantize.size=-1", "--size -1: expected a positive number of bytes"),
        ("quantize.size=100000", "chooses the types itself"),
        ("quantize.pure=maybe", "expected true or false, got 'maybe'"),
        ("calibrate.tokens=many", "expected a whole number, got 'many'"),
        ("calibrate.text=[]", "expected a list of file names"),
        ("replicate.layers=[3]", "expected a string, got 3"),
        ('replicate.layers=["9:serial:1"]', "9:serial:1"),
        ("rotate.rotate=perhaps", "expected one of auto, always, never"),
        ("rotate.type=Q4_X", "Q4_X"),
        ("rotate.hidden=wide", "expected one of none, full, got 'wide'"),
        ("model.target=ggml", "expected one of llama.cpp, rondel"),
        ("model.path=nowhere", "nowhere"),
        ("export.type=F16", "not quantized"),
        ("quantize", "expected section.key=value"),
    ],
)
def test_what_a_recipe_cannot_mean_is_refused_before_work(
    folder: Path, tmp_path: Path, change: str, message: str
) -> None:
    done = rondel("build", folder / "recipe.toml", "-o", tmp_path / "out", "--set", change)
    assert isinstance(done.exception, RondelError), done.output
    assert message in str(done.exception)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["[model", "path = 1", "[model]\npath = 'x'\n[run]\ntokens = 1.5"])
def test_a_recipe_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.toml").write_text(text, encoding="utf-8")
    done = rondel("build", tmp_path / "bad.toml", "-o", tmp_path / "out")
    assert isinstance(done.exception, RondelError)
    assert "bad.toml" in str(done.exception)
