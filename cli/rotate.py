"""`rondel rotate`: options to RotateConfig, one call, one report."""

from __future__ import annotations

from typing import Annotated

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
    SeedOption,
    StatsOption,
    TargetOption,
    ThreadsOption,
)


def rotate(
    model: ModelArgument,
    output: OutputOption,
    stats: StatsOption = None,
    residual: Annotated[bool, typer.Option(help="R1: turn the residual stream; folds the norms' gains.")] = True,
    heads: Annotated[bool, typer.Option(help="R2: turn the channels of each value head.")] = True,
    hidden: Annotated[
        str,
        typer.Option(
            "--hidden",
            metavar="BLOCK",
            help="R4: turn the hidden layer while running, in blocks of so many channels, or full; target rondel only.",
        ),
    ] = "none",
    queries: Annotated[
        str,
        typer.Option(
            "--queries",
            metavar="BLOCK",
            help="R3: turn each head's queries and keys while running, in blocks of so many channels, or full; target "
            "rondel only.",
        ),
    ] = "none",
    keep_tied: Annotated[
        bool,
        typer.Option("--keep-tied", help="Turn the ends of the residual stream while running; target rondel only."),
    ] = False,
    latents: Annotated[
        bool, typer.Option(help="Turn the latents of latent attention, where a model has them; folds their norms.")
    ] = True,
    nope: Annotated[
        bool, typer.Option(help="Turn what heads of latent attention hold without RoPE, where a model has it.")
    ] = True,
    seed: SeedOption = 0,
    target: TargetOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Change the basis of MODEL's weights so that they round better; its function stays.

    Randomized Hadamard rotations spread outliers over all channels. They help formats that know nothing of channels;
    with an importance matrix, measure before you use them (`rondel eval`).

    Example:

    \b
      rondel rotate MODEL --stats calib/ -o rotated/
    """
    from rondel.converters.checkpoint import open_checkpoint
    from rondel.converters.stats import open_stats
    from rondel.quant import rotate as stage

    config = stage.RotateConfig(
        residual=residual,
        heads=heads,
        keep_tied=keep_tied,
        latents=latents,
        nope=nope,
        queries=int(queries) if queries.isdecimal() else queries,  # type: ignore[arg-type]  # likewise
        hidden=int(hidden) if hidden.isdecimal() else hidden,  # type: ignore[arg-type]  # the stage names a wrong word
        seed=seed,
        target=target,
    )
    source = open_checkpoint(model)
    seen = open_stats(stats) if stats else None
    if dry_run:
        return console.plan(stage.plan(source, config, seen), as_json=as_json)
    with console.progress(quiet=quiet) as progress:
        made = stage.rotate(
            source, output, config, seen, threads=threads, device=device, force=force, progress=progress
        )
    return console.result(*console.written("rotate", output, made.manifest), as_json=as_json, quiet=quiet)
