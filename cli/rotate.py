"""`rondel rotate`: options to RotateConfig, one call, one report."""

from __future__ import annotations

from typing import Annotated, Any, Literal

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

KindOption = Annotated[
    Literal["hadamard", "orthogonal", "optrot", "dfrot"],
    typer.Option(
        "--kind",
        metavar="hadamard|orthogonal|optrot|dfrot",
        help="Of the fused rotations: random signs and a Hadamard matrix, random orthogonal ones, or that of the "
        "residual stream optimized for the weights (optrot) or for the activations (dfrot, with --stats).",
    ),
]
TriesOption = Annotated[
    int,
    typer.Option(
        "--tries",
        metavar="N",
        min=1,
        help="Seeds to choose from, --seed and the next ones. Judged by what rounding three layers to --type loses "
        "with --stats, by the fourth powers of their weights without.",
    ),
]
TypeOption = Annotated[
    str, typer.Option("--type", metavar="TYPE", help="The format that --tries are judged by: Q4_0, Q2_K, U4, ...")
]
MassiveOption = Annotated[
    Literal["keep", "weight", "ignore"],
    typer.Option(
        "--massive",
        metavar="keep|weight|ignore",
        help="What dfrot makes of tokens with one channel 100 times their mean magnitude: counts them like all others, "
        "100 times, or not at all.",
    ),
]
AutoOption = Annotated[
    str | None,
    typer.Option(
        "--auto",
        metavar="TYPE",
        help="Measure what quantizing to TYPE (Q4_K_M, IQ2_XXS, ...) loses with and without the rotation, print the "
        "table, and leave the model as it is unless rotating gains. Needs --stats.",
    ),
]
UndoOption = Annotated[
    bool,
    typer.Option(
        "--undo",
        help="Write rotated float MODEL in its original basis again, as for merging a LoRA. Other options that say "
        "what to turn mean nothing then.",
    ),
]


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
    rope_pairs: Annotated[
        bool, typer.Option("--rope-pairs", help="Turn queries and keys inside RoPE's planes by random angles; fused.")
    ] = False,
    latents: Annotated[
        bool, typer.Option(help="Turn the latents of latent attention, where a model has them; folds their norms.")
    ] = True,
    nope: Annotated[
        bool, typer.Option(help="Turn what heads of latent attention hold without RoPE, where a model has it.")
    ] = True,
    kind: KindOption = "hadamard",
    tries: TriesOption = 1,
    type_: TypeOption = "Q4_0",
    massive: MassiveOption = "weight",
    auto: AutoOption = None,
    undo: UndoOption = False,
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
    with an importance matrix, measure before you use them (`rondel eval`). The optimized kinds start from one: optrot
    makes the fourth powers of the weights small and needs no data, dfrot the rounding error of activations on the text
    of --stats. Their time grows with the cube of the width.

    Example:

    \b
      rondel rotate MODEL --stats calib/ -o rotated/
      rondel rotate MODEL --stats calib/ --kind optrot --tries 4 --type Q2_K -o rotated/
      rondel rotate MODEL --stats calib/ --auto Q2_K -o rotated/
      rondel rotate rotated/ --undo -o original/
    """
    from rondel.converters.checkpoint import open_checkpoint
    from rondel.converters.stats import open_stats
    from rondel.quant import rotate as stage
    from rondel.quant.unrotate import plan_undo
    from rondel.quant.unrotate import undo as undo_stage

    config = stage.RotateConfig(
        residual=residual,
        heads=heads,
        keep_tied=keep_tied,
        latents=latents,
        nope=nope,
        rope_pairs=rope_pairs,
        queries=int(queries) if queries.isdecimal() else queries,  # type: ignore[arg-type]  # likewise
        hidden=int(hidden) if hidden.isdecimal() else hidden,  # type: ignore[arg-type]  # the stage names a wrong word
        kind=kind,
        seed=seed,
        tries=tries,
        type=type_,
        massive=massive,
        auto=auto,
        target=target,
    )
    source = open_checkpoint(model)
    if undo:
        if stats or auto:
            raise typer.BadParameter("--undo takes neither --stats nor --auto: statistics stay in the rotated basis")
        if dry_run:
            return console.plan(plan_undo(source), as_json=as_json)
        with console.progress(quiet=quiet) as progress:
            made = undo_stage(source, output, threads=threads, device=device, force=force, progress=progress)
        return console.result(*console.written("rotate", output, made.manifest), as_json=as_json, quiet=quiet)
    seen = open_stats(stats) if stats else None
    if dry_run:
        with console.progress(quiet=quiet) as progress:
            planned = stage.plan(source, config, seen, threads=threads, progress=progress)
        return console.plan(planned, as_json=as_json)
    with console.progress(quiet=quiet) as progress:
        made = stage.rotate(
            source, output, config, seen, threads=threads, device=device, force=force, progress=progress
        )
    told, line = console.written("rotate", output, made.manifest)
    choice = made.manifest.get("rotation_choice")
    if choice:
        told, line = told | {"choice": choice}, f"{choice_text(choice)}\n{line}"
    return console.result(told, line, as_json=as_json, quiet=quiet)


def choice_text(choice: dict[str, Any]) -> str:
    """The choice's table and its reason."""
    lines = choice["tensors"]
    head = ("tensors", "formats", "error as is", "scale dB", "rotate dB", "rotate and scale dB")
    table = console.table(head, [list(line.values()) for line in lines])
    way = choice["chosen"].replace("_", " ")
    bytes_ = f"{choice['bytes']['now']} B of matrices as is, {choice['bytes']['rotated']} B rotated"
    paid = f" ({choice['decibels_for_bytes']:+.2f} dB)" if choice["decibels_for_bytes"] else ""
    return (
        f"{table}\n{bytes_}{paid}\n{choice['type']}: {way}, because {choice['reason']}; "
        f"then quantize with --method {choice['method']}"
    )
