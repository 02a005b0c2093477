"""`rondel export`: options to ExportConfig, one call, one report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rondel.cli import console
from rondel.cli.options import (
    DryRunOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    QuietOption,
    TargetOption,
    UnusedDeviceOption,
    UnusedSeedOption,
    UnusedThreadsOption,
    parse_size,
)

PathOption = Annotated[
    str,
    typer.Option(
        "--output",
        "-o",
        metavar="PATH",
        help="The file, or a folder (made if it ends in /) that gets GGUF's usual name.",
    ),
]
FloatTypeOption = Annotated[
    str | None,
    typer.Option(
        "--type",
        metavar="F16|F32|BF16",
        help="For the matrices of a model that is not quantized. Default: as they are stored.",
    ),
]
SplitOption = Annotated[
    str | None, typer.Option("--split", metavar="SIZE", help="Start a new file after 500M, 2G, ...")
]
MaterializeOption = Annotated[bool, typer.Option("--materialize", help="Write layers that run twice as two layers.")]
NameOption = Annotated[str | None, typer.Option("--name", help="The model's name in the file. Default: its folder's.")]
PreOption = Annotated[
    str | None, typer.Option("--pre", help="llama.cpp's name of the pre-tokenizer, where rondel does not know it.")
]


def export(
    model: ModelArgument,
    output: PathOption,
    type_: FloatTypeOption = None,
    split: SplitOption = None,
    materialize: MaterializeOption = False,
    name: NameOption = None,
    pre: PreOption = None,
    seed: UnusedSeedOption = 0,
    target: TargetOption = None,
    threads: UnusedThreadsOption = None,
    device: UnusedDeviceOption = "cpu",
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write MODEL as a GGUF file.

    MODEL may be quantized or not. Files for llama.cpp run in every llama.cpp since spring 2024; files that need
    rondel's own runtime say so, and llama.cpp refuses them.

    Example:

    \b
      rondel export MODEL --type F16 -o model.gguf
      rondel export quantized/ --split 2G -o files/
    """
    from rondel.converters import export as stage
    from rondel.converters.checkpoint import open_checkpoint

    out = Path(output)
    config = stage.ExportConfig(
        type=type_,
        split=parse_size("--split", split) if split else None,
        materialize=materialize,
        target=target,
        name=name,
        pre=pre,
    )
    source = open_checkpoint(model)
    if dry_run:
        return console.plan(stage.plan(source, out, config), as_json=as_json)
    if output.endswith("/"):
        out.mkdir(parents=True, exist_ok=True)
    with console.progress(quiet=quiet) as progress:
        files = stage.export(source, out, config, force=force, progress=progress)
    told = {
        "command": "export",
        "files": [str(file) for file in files],
        "bytes": sum(file.stat().st_size for file in files),
    }
    text = "\n".join(f"{file}  {console.size(file.stat().st_size)}" for file in files)
    return console.result(told, text, as_json=as_json, quiet=quiet)
