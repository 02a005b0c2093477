"""`rondel rotate`: options to RotateConfig, one call, one report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rondel.cli import console, decision
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
from rondel.cli.report import check_report, write_report
from rondel.cli.rotation_page import render

if TYPE_CHECKING:
    from rondel.quant.rotate import RotateConfig

RotateOption = Annotated[
    Literal["auto", "always", "never"],
    typer.Option(
        "--rotate",
        metavar="auto|always|never",
        help="auto: with --stats, measure what quantizing to --type loses with and without all that is asked for here, "
        "print the table, and leave the model as it is unless rotating gains; without --stats, rotate.",
    ),
]
TypeOption = Annotated[
    str,
    typer.Option(
        "--type",
        metavar="TYPE",
        help="What the model will be quantized to: Q4_0, IQ2_XXS, U4, ... The decision and --tries go by it.",
    ),
]
ResidualOption = Annotated[
    bool, typer.Option("--residual/--no-residual", help="R1: turn the residual stream; folds the norms' gains.")
]
KeepTiedOption = Annotated[
    bool, typer.Option("--keep-tied", help="Turn the ends of the residual stream while running; target rondel only.")
]
HeadsOption = Annotated[bool, typer.Option("--heads/--no-heads", help="R2: turn the channels of each value head.")]
LatentsOption = Annotated[
    bool,
    typer.Option(
        "--latents/--no-latents",
        help="Turn the latents of latent attention, where a model has them; folds their norms.",
    ),
]
NopeOption = Annotated[
    bool,
    typer.Option(
        "--nope/--no-nope", help="Turn what heads of latent attention hold without RoPE, where a model has it."
    ),
]
RopePairsOption = Annotated[
    bool, typer.Option("--rope-pairs", help="Turn queries and keys inside RoPE's planes by random angles; fused.")
]
QueriesOption = Annotated[
    str,
    typer.Option(
        "--queries",
        metavar="BLOCK",
        help="R3: turn each head's queries and keys while running, in blocks of so many channels, or full; target "
        "rondel only.",
    ),
]
HiddenOption = Annotated[
    str,
    typer.Option(
        "--hidden",
        metavar="BLOCK",
        help="R4: turn the hidden layer while running, in blocks of so many channels, or full; target rondel only.",
    ),
]
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
MassiveOption = Annotated[
    Literal["keep", "weight", "ignore"],
    typer.Option(
        "--massive",
        metavar="keep|weight|ignore",
        help="What dfrot makes of tokens with one channel 100 times their mean magnitude: counts them like all others, "
        "100 times, or not at all.",
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
ReportOption = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE",
        help="Write the ranges of channels before and after, massive activations and the decision: a page (.html), or "
        "its facts (.json). Without --stats of the weights alone.",
    ),
]


def rotate(
    model: ModelArgument,
    output: OutputOption,
    stats: StatsOption = None,
    rotate_: RotateOption = "auto",
    type_: TypeOption = "Q4_K_M",
    residual: ResidualOption = True,
    keep_tied: KeepTiedOption = False,
    heads: HeadsOption = True,
    latents: LatentsOption = True,
    nope: NopeOption = True,
    rope_pairs: RopePairsOption = False,
    queries: QueriesOption = "none",
    hidden: HiddenOption = "none",
    kind: KindOption = "hadamard",
    seed: SeedOption = 0,
    tries: TriesOption = 1,
    massive: MassiveOption = "weight",
    undo: UndoOption = False,
    report: ReportOption = None,
    target: TargetOption = None,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Change the basis of MODEL's weights so that they round better, where that pays; its function stays.

    Randomized Hadamard rotations spread outliers over all channels. That helps formats that know nothing of channels,
    and costs others, so --stats decide: all rotations asked for together, online ones too, against none. The optimized
    kinds start from Hadamards: optrot makes the fourth powers of the weights small and needs no data, dfrot the
    rounding error of activations on the text of --stats. Their time grows with the cube of the width.

    Example:

    \b
      rondel rotate MODEL --stats calib/ --type Q2_K -o rotated/
      rondel rotate MODEL --stats calib/ --type Q2_K --kind optrot --tries 4 --report rotated.html -o rotated/
      rondel rotate MODEL --rotate always --hidden full --target rondel -o rotated/
      rondel rotate rotated/ --undo -o original/
    """
    from rondel.quant.rotate import RotateConfig

    writing: dict[str, Any] = {"threads": threads, "device": device, "force": force}
    shown = {"dry_run": dry_run, "quiet": quiet, "as_json": as_json}
    if undo:
        if stats or rotate_ != "auto":
            raise typer.BadParameter("--undo takes neither --stats nor --rotate: statistics stay in the rotated basis")
        if report:
            raise typer.BadParameter("--undo takes no --report: there is nothing to tell of the way back")
        return _undo(model, output, writing, **shown)
    settings = {"rotate": rotate_, "type": type_, "residual": residual, "keep_tied": keep_tied, "heads": heads}
    settings |= {"latents": latents, "nope": nope, "rope_pairs": rope_pairs, "kind": kind, "seed": seed}
    settings |= {"queries": _block(queries), "hidden": _block(hidden), "tries": tries, "massive": massive}
    config = RotateConfig(**settings, target=target)  # type: ignore[arg-type]  # the stage names a wrong word
    if report:
        check_report(report, dry_run=dry_run)
    return _rotate(model, output, config, stats, report, writing, **shown)


def _block(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _undo(model: Path, output: Path, writing: dict[str, Any], *, dry_run: bool, quiet: bool, as_json: bool) -> None:
    from rondel.converters.checkpoint import open_checkpoint
    from rondel.quant.unrotate import plan_undo, undo

    source = open_checkpoint(model)
    if dry_run:
        return console.plan(plan_undo(source), as_json=as_json)
    with console.progress(quiet=quiet) as progress:
        made = undo(source, output, progress=progress, **writing)
    return console.result(*console.written("rotate", output, made.manifest), as_json=as_json, quiet=quiet)


def _rotate(
    model: Path,
    output: Path,
    config: RotateConfig,
    stats: Path | None,
    report: Path | None,
    writing: dict[str, Any],
    *,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    from rondel.converters.checkpoint import open_checkpoint
    from rondel.converters.stats import stats_for
    from rondel.quant import rotate as stage
    from rondel.quant.rotation_report import report_of

    source = open_checkpoint(model)
    seen = stats_for(source, stats)
    with console.progress(quiet=quiet) as progress:
        if dry_run:
            planned = stage.plan(source, config, seen, threads=writing["threads"], progress=progress)
        else:
            made = stage.rotate(source, output, config, seen, progress=progress, **writing)
            if report:
                told = report_of(source, made, config, seen, threads=writing["threads"])
                write_report(report, told, render)
    if dry_run:
        return console.plan(planned, as_json=as_json)
    told, line = decision.with_choice(*console.written("rotate", output, made.manifest), made.manifest)
    return console.result(told, line, as_json=as_json, quiet=quiet)
