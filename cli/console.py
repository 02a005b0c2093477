"""Everything the user sees: progress, results, the error line. No other module knows Rich.

Results go to standard output, as text or as one JSON object; progress and errors go to standard error.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rondel.converters.progress import Progress, silent

LONGEST_CELL = 160  # characters of a value: a chat template is not read in a table
LOG_INTERVAL = 5.0  # seconds between two progress lines in a log


def printable(text: str) -> str:
    """Text of a file that may be hostile, with control characters escaped: it cannot drive the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


def error(sentence: str) -> None:
    """One line on standard error, "error: ..." in red where there is a terminal that shows colours."""
    from rich.console import Console
    from rich.text import Text

    # soft_wrap: one error is one line for grep, whatever the width of the terminal.
    Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), printable(sentence)))


def warn(sentence: str) -> None:
    """One line on standard error, "warning: ..."."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text.assemble(("warning: ", "yellow"), printable(sentence)))


def note(sentence: str) -> None:
    """One line on standard error, "note: ..."."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text.assemble(("note: ", "cyan"), printable(sentence)))


class _LogLines:
    """Plain progress lines: the first, the last, and one every few seconds."""

    def __init__(self) -> None:
        self._last: float | None = None

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if self._last is None or done >= total or now - self._last >= LOG_INTERVAL:
            self._last = now
            print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)


@contextmanager
def progress(*, quiet: bool) -> Iterator[Progress]:
    """What a stage tells its progress to: a bar with time left on a terminal, plain lines in a log, or nobody."""
    if quiet:
        yield silent
        return
    if not sys.stderr.isatty():
        yield _LogLines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:

        def show(done: int, total: int, what: str) -> None:
            task = bar.task_ids[0] if bar.task_ids else bar.add_task(what, total=total)
            bar.update(task, completed=done, total=total, description=what)

        yield show


def result(told: dict[str, Any], text: str, *, as_json: bool, quiet: bool = False) -> None:
    """Print a command's result: the JSON object alone, or the text, or nothing."""
    if as_json:
        encoding = sys.stdout.encoding or "ascii"
        text = json.dumps(told, ensure_ascii=encoding.lower() not in ("utf-8", "utf8"))
        # Bytes of a file that are not UTF-8 arrive as lone surrogates; "\\udc80" is what JSON calls them too.
        print(text.encode(encoding, "backslashreplace").decode(encoding))
    elif not quiet:
        print(text)


def lines(told: dict[str, Any]) -> str:
    """Nested facts as aligned "key value" lines, records that come in numbers as tables behind them."""
    rows: list[tuple[str, str]] = []
    tables: list[str] = []
    _flatten(told, "", rows, tables)
    width = max((len(key) for key, _ in rows), default=0)
    return "\n\n".join(["\n".join(f"{key:<{width}}  {value}" for key, value in rows), *tables])


def _flatten(told: dict[str, Any], prefix: str, rows: list[tuple[str, str]], tables: list[str]) -> None:
    for key, value in told.items():
        if isinstance(value, dict) and value and all(isinstance(item, dict) for item in value.values()):
            tables.append(_records(prefix + key, [{"name": name} | item for name, item in value.items()]))
        elif isinstance(value, list | tuple) and value and all(isinstance(item, dict) for item in value):
            tables.append(_records(prefix + key, list(value)))
        elif isinstance(value, dict) and value:
            _flatten(value, f"{prefix}{key}.", rows, tables)
        else:
            rows.append((prefix + key, _cell(value)))


def _records(title: str, records: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for record in records for column in record))
    kept = (int, float)
    cells = [
        [record[c] if type(record.get(c)) in kept else _cell(record.get(c, "")) for c in columns] for record in records
    ]
    return f"{title}:\n{table(columns, cells)}"


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return printable(", ".join(map(str, value))) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = printable(str(value)) if value != {} and value is not None else "none"
    return text if len(text) <= LONGEST_CELL else f"{text[:LONGEST_CELL]!r}... ({len(text)} characters)"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows under a head, columns aligned: numbers right, the rest left. Plain text, so that it pipes well."""
    cells = [[f"{cell:.6g}" if isinstance(cell, float) else printable(str(cell)) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in [list(head), *cells]) for column in range(len(head))]
    right = [bool(rows) and all(isinstance(row[column], int | float) for row in rows) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if at_right else cell.ljust(width)
            for cell, width, at_right in zip(row, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(head), *map(line, cells)])


def size(count: int) -> str:
    """A number of bytes for people: "7.35 MB" (powers of ten, as disks count)."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{count} B" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


def plan(told: dict[str, Any], *, as_json: bool) -> None:
    """Print what a stage would do, for --dry-run."""
    result(told, lines(told), as_json=as_json, quiet=False)


def written(command: str, output: Path, manifest: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What a stage wrote, as the JSON object and as a line: the folder, its size on disk, its tensors by format."""
    formats: dict[str, int] = {}
    for entry in manifest["tensors"].values():
        formats[entry["format"]] = formats.get(entry["format"], 0) + 1
    stored = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    told = {
        "command": command,
        "output": str(output),
        "bytes": stored,
        "tensors": formats,
        "stages": manifest["stages"],
    }
    counts = ", ".join(f"{count} {name}" for name, count in sorted(formats.items()))
    return told, f"{output}  {size(stored)}  {counts}"
