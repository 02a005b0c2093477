"""`rondel replicate`: options to ReplicateConfig, one call, one report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rondel.cli import console
from rondel.cli.options import (
    DeviceOption,
    DryRunOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    OutputOption,
    QuietOption,
    TargetOption,
    ThreadsOption,
    UnusedSeedOption,
)

LayerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--layer",
        metavar="N:MODE:COPIES[:OPTION]",
        help="Run layer N (from 0) COPIES more times: serial after itself, or parallel, merged by mean, sum or "
        "weighted_sum. May be repeated. Without it, rondel chooses (and chooses none yet).",
    ),
]
TeacherOption = Annotated[
    Path | None,
    typer.Option("--teacher", metavar="MODEL", help="The unquantized model that the copies are judged by."),
]
GateOption = Annotated[
    float | None, typer.Option("--gate", help="How much a copy adds. Default: 1 in a mean, else 0.1.")
]
CopiesCacheOption = Annotated[
    Literal["own", "shared"] | None,
    typer.Option(
        "--kv",
        metavar="own|shared",
        help="Keys and values of the copies. Default: own where serial, shared where parallel.",
    ),
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Programs that cannot run the copies shall refuse the file.")
]


def replicate(
    model: ModelArgument,
    output: OutputOption,
    layer: LayerOption = None,
    teacher: TeacherOption = None,
    gate: GateOption = None,
    kv: CopiesCacheOption = None,
    strict: StrictOption = False,
    seed: UnusedSeedOption = 0,
    target: TargetOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Let layers of MODEL run more than once.

    The copies share the layer's weights and have small parameters of their own. llama.cpp ignores them and runs every
    layer once; rondel runs them; `export --materialize` writes serial copies as layers.

    Example:

    \b
      rondel replicate quantized/ --teacher MODEL --layer 2:serial:1 -o replicated/
      rondel replicate quantized/ --layer 1:parallel:2:mean -o replicated/
    """
    from rondel.converters.checkpoint import open_checkpoint
    from rondel.quant import replicate as stage

    config = stage.ReplicateConfig(layers=tuple(layer or ()), gate=gate, kv=kv, strict=strict, target=target)
    source = open_checkpoint(model)
    judge = open_checkpoint(teacher) if teacher else None
    if dry_run:
        return console.plan(stage.plan(source, config, judge), as_json=as_json)
    with console.progress(quiet=quiet) as progress:
        made = stage.replicate(
            source, output, config, judge, threads=threads, device=device, force=force, progress=progress
        )
    if not quiet:
        for note in made.stages[-1]["result"]["notes"]:
            console.warn(note)
    return console.result(*console.written("replicate", output, made.manifest), as_json=as_json, quiet=quiet)
