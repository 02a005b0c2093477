"""`rondel calibrate`: options to CalibrateConfig, one call, one report."""

from __future__ import annotations

import shutil
from pathlib import Path
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
    ThreadsOption,
    UnusedTargetOption,
)


def calibrate(
    model: ModelArgument,
    output: OutputOption,
    text: Annotated[list[Path], typer.Option("--text", metavar="FILE", help="A UTF-8 text file. May be repeated.")],
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Stop after this many tokens.")] = 131072,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens of one sequence.")] = 512,
    diagonal: Annotated[
        bool, typer.Option("--diagonal", help="Means of squares only, no full second moments.")
    ] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap each document in the model's chat template.")] = False,
    imatrix: Annotated[
        Path | None, typer.Option("--imatrix", metavar="FILE", help="Write llama.cpp's imatrix file here too.")
    ] = None,
    seed: SeedOption = 0,
    target: UnusedTargetOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure what every linear layer of MODEL sees on text.

    One decoder layer is in memory at a time. The output holds, for every place that linear layers read, the second
    moments of the activations, their largest values and the number of tokens; rotate and quantize use them. It also
    holds the text itself, as token ids, because quantize runs the model on it again: treat it as confidential as the
    text.

    Example:

    \b
      rondel calibrate MODEL --text stories.txt -o calib/
    """
    from rondel.converters.checkpoint import open_checkpoint
    from rondel.quant import calibrate as stage

    config = stage.CalibrateConfig(tokens=tokens, context=context, seed=seed, diagonal=diagonal, chat=chat)
    source = open_checkpoint(model)
    if dry_run:
        return console.plan(stage.plan(source, config, text), as_json=as_json)
    with console.progress(quiet=quiet) as progress:
        made = stage.calibrate(
            source, output, config, text, threads=threads, device=device, force=force, progress=progress
        )
    if imatrix:
        shutil.copyfile(output / stage.IMATRIX, imatrix)
    return console.result(*console.written("calibrate", output, made.manifest), as_json=as_json, quiet=quiet)
