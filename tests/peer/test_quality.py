"""The benchmark of quality: what it keeps, what it writes, and one comparison from end to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.peer.llama import find_library

ROOT = Path(__file__).parent.parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("the benchmarks lie in the repository alone", allow_module_level=True)
sys.path.insert(0, str(ROOT))
from benchmarks import case as files  # noqa: E402
from benchmarks import command, quality  # noqa: E402

DEMO = ROOT / "tests" / "models" / "stories-4m"
CASE = {
    "model": "tiny",
    "calibration": "seen.txt",
    "evaluation": "unseen.txt",
    "context": 512,
    "windows": 16,
    "perplexity": 12.3456,
}
ROW = {"bytes": 1000, "tensor_bytes": 900, "perplexity": 13.0, "kl_99_9": 0.5, "same_top": 0.9, "seconds": 1.25}


def case(theirs: float = 0.1, ours: float = 0.05) -> dict[str, Any]:
    rows = [
        ROW | {"type": "Q2_K", "by": "llama-quantize", "mean_kl": theirs},
        ROW | {"type": "Q2_K", "by": "rondel gptq", "mean_kl": ours, "kl_ratio": ours / theirs},
    ]
    return CASE | {"rows": rows}


def test_the_table_has_a_row_a_file() -> None:
    lines = quality.table(case()).splitlines()
    assert "perplexity of the float model 12.346" in lines[0]
    assert lines[-2] == "| Q2_K | llama-quantize | 1000 | 900 | 13.000 | 0.10000 | 0.500 | 90.00 % | 1.2 |  |"
    assert lines[-1].endswith("| 0.05000 | 0.500 | 90.00 % | 1.2 | **0.50** |")
    assert len({line.count("|") for line in lines[2:]}) == 1


def test_the_readme_keeps_what_is_around_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, end = command.markers("quality")
    (tmp_path / "README.md").write_text(f"before\n{start}old\n{end}behind\n", encoding="utf-8")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    command.write_readme("quality", "new\n")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == f"before\n{start}new\n{end}behind\n"


@pytest.mark.parametrize("name", ["quality", "rotation", "replication"])
def test_the_readme_has_the_markers(name: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    start, end = command.markers(name)
    assert text.index(start) < text.index(end)


def test_what_was_made_is_made_again_only_for_another_key(tmp_path: Path) -> None:
    made: list[str] = []

    def make() -> dict[str, Any]:
        made.append("once more")
        (tmp_path / "file").write_text("x", encoding="utf-8")
        return {"told": len(made)}

    assert [files.kept(tmp_path / "file", key, make)["told"] for key in ("a", "a", "b")] == [1, 1, 2]
    (tmp_path / "file").unlink()
    assert files.kept(tmp_path / "file", "b", make)["told"] == 3


def test_what_failed_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("half", encoding="utf-8")

    def fail() -> dict[str, Any]:
        raise SystemExit("no")

    for _ in range(2):
        with pytest.raises(SystemExit):
            files.kept(tmp_path / "file", "a", fail)


def test_the_command_asks_for_a_type_or_for_its_bytes() -> None:
    plain = files.Wanted("Q2_K", like=False, method="gptq", arguments=())
    assert (plain.command, plain.name) == (["--type", "Q2_K", "--method", "gptq"], "rondel gptq")
    like = files.Wanted("IQ2_M", like=True, method=None, arguments=("--seed", "1"))
    assert (like.command, like.name) == (["--like", "IQ2_M", "--seed", "1"], "rondel --like --seed 1")


def test_a_text_is_cut_at_the_end_of_a_line(tmp_path: Path) -> None:
    text = tmp_path / "story.txt"
    text.write_text("one line\n" * 100, encoding="utf-8")
    seen, unseen = (part.read_text(encoding="utf-8") for part in command._split(text, tmp_path))
    assert seen + unseen == "one line\n" * 100
    assert len(unseen) == pytest.approx(225, abs=9)


@pytest.mark.peer
@pytest.mark.slow
@pytest.mark.skipif(find_library() is None, reason="unmodified llama.cpp is not installed (make install-peer)")
def test_one_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a texts folder beside the repository, and without llama_model_quantize."""
    monkeypatch.setattr(command, "SHARED", tmp_path / "nowhere")
    monkeypatch.setattr(files, "find_quantizer", lambda: None)
    arguments = ["--model", str(DEMO), "--types", "Q2_K", "--windows", "1", "--threads", "2", "--json"]
    monkeypatch.setattr(sys, "argv", ["quality.py", *arguments, "--work", str(tmp_path / "work")])
    quality.main()
    first = json.loads(capsys.readouterr().out)
    (told,) = first["cases"]
    theirs, ours = told["rows"]
    assert ours["kl_ratio"] == pytest.approx(ours["mean_kl"] / theirs["mean_kl"])
    assert ours["tensor_bytes"] == theirs["tensor_bytes"]
    assert told["perplexity"] < min(theirs["perplexity"], ours["perplexity"])
    monkeypatch.setattr(files, "rondel", None)  # everything is kept
    quality.main()
    assert json.loads(capsys.readouterr().out) == first
