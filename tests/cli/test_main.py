"""The program itself: names, exit codes, what is imported when, and where errors end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# What the list of commands may not wait for.
HEAVY = ("torch", "transformers", "numpy", "gguf", "tokenizers", "rich.console", "cffi")


def rondel(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rondel.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


def test_help_lists_the_chain_in_order() -> None:
    done = rondel("--help")
    assert done.returncode == 0
    names = [line.split()[0] for line in done.stdout.split("Commands:")[1].splitlines() if line[2:3].isalpha()]
    chain = ["calibrate", "rotate", "quantize", "replicate", "export", "run"]
    assert names == [*chain, "build", "eval", "inspect", "verify", "bench"]


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom rondel.cli.main import main\nsys.argv = ['rondel', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_version() -> None:
    from importlib.metadata import version

    assert rondel("--version").stdout == f"rondel {version('rondel')}\n"


@pytest.mark.parametrize("arguments", [["nonsense"], ["--nonsense"], []])
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    assert rondel(*arguments).returncode == 2


def _main_with(monkeypatch: pytest.MonkeyPatch, problem: BaseException) -> int | str | None:
    from rondel.cli import main

    def fail(**_: object) -> None:
        raise problem

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(SystemExit) as exit_:
        main.main()
    return exit_.value.code


def test_errors_of_the_user_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from rondel.converters.errors import RondelError
    from rondel.native.library import NativeError

    long = "a/path/that/is/long " * 12 + "[bold]and holds brackets[/bold]"
    assert _main_with(monkeypatch, RondelError(long)) == 1
    assert capsys.readouterr() == ("", f"error: {long}\n")
    assert _main_with(monkeypatch, NativeError("file: truncated")) == 1
    assert capsys.readouterr() == ("", "error: file: truncated\n")
    assert _main_with(monkeypatch, PermissionError(13, "Permission denied", "out")) == 1
    assert capsys.readouterr() == ("", "error: out: Permission denied\n")


def test_an_interrupt_is_silent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main_with(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr() == ("", "")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from rondel.cli import main

    def fail(**_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(ZeroDivisionError):
        main.main()


def test_a_reader_that_goes_away_is_no_error() -> None:
    program = (
        "from rondel.cli import main\nmain.app = lambda **_: [print('x' * 100) for _ in range(10000)]\nmain.main()"
    )
    writer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stderr is not None
    writer.stdout.readline()
    writer.stdout.close()
    assert writer.stderr.read() == b""
    writer.stderr.close()
    assert writer.wait() == 141


def test_a_wrong_choice_is_told_without_the_validator_s_prefix() -> None:
    done = rondel("run", "model.gguf", "--kv", "Q8")
    assert done.returncode == 2
    assert "'Q8' is not one of 'auto', 'F16', 'F32'" in done.stderr
    assert "Value error" not in done.stderr
