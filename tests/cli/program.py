"""Runs the `rondel` program inside the test's process: a new one takes half a second to start."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from rondel.cli.main import main


@dataclass(frozen=True)
class Done:
    """What a command printed, and its exit code."""

    code: int | str | None
    stdout: str
    stderr: str


def rondel(*arguments: str | Path, stdin: bytes = b"") -> Done:
    """`rondel ARGUMENTS`, up to and including the place where errors become exit codes."""
    stdout, stderr = io.StringIO(), io.StringIO()
    code: int | str | None = 0
    with (
        mock.patch.object(sys, "argv", ["rondel", *map(str, arguments)]),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin))),
        redirect_stdout(stdout),
        redirect_stderr(stderr),
    ):
        try:
            main()
        except SystemExit as left:
            code = left.code or 0
    return Done(code, stdout.getvalue(), stderr.getvalue())
