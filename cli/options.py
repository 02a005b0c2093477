"""The options that several commands share, as types: one name, one help text; and how a size is written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rondel.converters.errors import RondelError

Target = Literal["llama.cpp", "rondel"]

ModelArgument = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A Hugging Face folder, or the output of an earlier command.")
]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file; of a split one, the first part.")]
OutputOption = Annotated[
    Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write; it appears when it is complete.")
]
StatsOption = Annotated[
    Path | None,
    typer.Option(
        "--stats", metavar="DIR", help="Statistics that calibrate wrote. Default: those that rotate left in MODEL."
    ),
]
TargetOption = Annotated[
    Target | None,
    typer.Option(
        "--target",
        metavar="llama.cpp|rondel",
        help="The program that will run the file. rondel allows its own formats and online rotations. "
        "Default: what an earlier stage fixed, else llama.cpp.",
    ),
]
SeedOption = Annotated[
    int, typer.Option("--seed", metavar="N", help="Of everything random: the same seed gives the same bytes.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        "-t",
        metavar="N",
        min=1,
        help="Processor threads; the result is the same for any number. Default: all cores.",
    ),
]
JobsOption = Annotated[
    int | None,
    typer.Option(
        "--jobs",
        "-j",
        "--threads",
        "-t",
        metavar="N",
        min=1,
        help="Windows, matrices and rows in work at once; the result is the same for any number. Default: all cores.",
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="Where torch does the arithmetic: cpu, cuda, cuda:1.")]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace an output that was made from other inputs or settings.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Check everything, print the plan and the sizes, write nothing.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on standard output.")]
HoldingArgument = Annotated[
    Path, typer.Argument(metavar="PATH", help="A GGUF file, or a folder that an earlier command wrote.")
]
# Scripts may pass the same options to every stage, also where a stage has no use for one.
UnusedSeedOption = Annotated[
    int, typer.Option("--seed", metavar="N", help="Accepted by every stage; this one has nothing random.")
]
UnusedTargetOption = Annotated[
    Target | None,
    typer.Option(
        "--target", metavar="llama.cpp|rondel", help="Accepted by every stage; this one's output is the same for both."
    ),
]
UnusedDeviceOption = Annotated[str, typer.Option("--device", help="Accepted by every stage; this one needs no device.")]
UnusedThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", "-t", metavar="N", min=1, help="Accepted by every stage; this one waits for the disk."),
]

# What runs a GGUF file.
CacheType = Literal["auto", "F16", "F32"]
CacheOption = Annotated[
    CacheType,
    typer.Option(
        "--kv",
        metavar="auto|F16|F32",
        help="Type of the cache of keys and values; auto: F32 for an F32 model, else F16.",
    ),
]
ReplicationOption = Annotated[
    bool, typer.Option("--replication/--no-replication", help="Run replicated layers as the file says, or once.")
]

UNITS = {"k": 10**3, "M": 10**6, "G": 10**9}


def parse_size(option: str, text: str) -> int:
    """A number of bytes, as llama.cpp counts them: "2G" is two thousand million, "2.5G" five hundred more."""
    digits, unit = (text[:-1], UNITS[text[-1]]) if text[-1:] in UNITS else (text, 1)
    whole, point, decimals = digits.partition(".")
    count = int(whole + decimals) * unit // 10 ** len(decimals) if (whole + decimals).isdecimal() else 0
    if not count or (point and unit == 1):
        raise RondelError(f"{option} {text}: expected a number of bytes such as 500M or 2.5G")
    return count
