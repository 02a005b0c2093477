"""`rondel replicate`: options to ReplicateConfig, one call, one report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rondel.cli import console
from rondel.cli.candidates import with_candidates
from rondel.cli.options import (
    DeviceOption,
    DryRunOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    OutputOption,
    QuietOption,
    SeedOption,
    TargetOption,
    ThreadsOption,
)

Cache = Literal["own", "shared"]

TeacherOption = Annotated[
    Path | None,
    typer.Option("--teacher", metavar="MODEL", help="The unquantized model, to fit and to judge by; with --text."),
]
TextOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="UTF-8 text to fit on; its last quarter judges. Needs --teacher. May be repeated.",
    ),
]
LayerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--layer",
        metavar="N:MODE:COPIES[:OPTION]",
        help="Run layer N (from 0) COPIES more times: serial after itself, or parallel, merged by mean, sum or "
        "weighted_sum. May be repeated. Without it, nothing is replicated.",
    ),
]
CopiesCacheOption = Annotated[
    Cache | None,
    typer.Option(
        "--kv",
        metavar="own|shared",
        help="Keys and values of the copies. Default: own where serial, shared where parallel.",
    ),
]
GateOption = Annotated[
    float | None,
    typer.Option("--gate", help="How much a copy adds. Default: 1 in a mean, else 0.1; fitting starts from 0."),
]
ContextOption = Annotated[
    int | None,
    typer.Option("--context", "-c", metavar="N", min=2, help="Tokens of a window. Default: 512, or what MODEL has."),
]
TokensOption = Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="The most of the text to use.")]
StepsOption = Annotated[int, typer.Option("--steps", metavar="N", min=0, help="Of every optimization.")]
TuneOption = Annotated[
    bool | None,
    typer.Option(
        "--tune/--no-tune",
        help="Fit the model's codes, block scales and norms to the teacher first, in the same formats and bytes. "
        "Default: with --teacher and --text.",
    ),
]
Preference = Literal["none", "replicate", "low-rank"]
PreferOption = Annotated[
    Preference,
    typer.Option(
        "--prefer",
        metavar="none|replicate|low-rank",
        help="Where another use of the copies' bytes is better: chosen copies are left out, or written all the same. "
        "low-rank writes a correction of as many bytes as the copies (without any: as a copy of every layer) instead, "
        "as a LoRA file that llama.cpp adds.",
    ),
]
AllowOption = Annotated[
    bool,
    typer.Option("--allow-regression", help="Write copies that make the model worse; the file says so. Else: exit 3."),
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Programs that cannot run the copies shall refuse the file.")
]


def replicate(
    model: ModelArgument,
    output: OutputOption,
    layer: LayerOption = None,
    teacher: TeacherOption = None,
    text: TextOption = None,
    kv: CopiesCacheOption = None,
    gate: GateOption = None,
    context: ContextOption = None,
    tokens: TokensOption = 131072,
    steps: StepsOption = 150,
    tune: TuneOption = None,
    prefer: PreferOption = "none",
    allow_regression: AllowOption = False,
    strict: StrictOption = False,
    seed: SeedOption = 0,
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
    layer once; rondel runs them; `export --materialize` writes serial copies as layers. With --teacher and --text MODEL
    itself is tuned first, then the copies are fitted, and text that fitted nothing tells whether they help; those that
    harm are refused with exit code 3. Without, they are written as --layer says.

    Example:

    \b
      rondel replicate quantized/ --teacher MODEL --text mine.txt -o tuned/
      rondel replicate quantized/ --teacher MODEL --text mine.txt --layer 2:serial:1 -o replicated/
      rondel replicate quantized/ --layer 1:parallel:2:mean -o replicated/
    """
    from rondel.converters.checkpoint import open_checkpoint
    from rondel.quant import replicate as stage

    config = stage.ReplicateConfig(
        layers=tuple(layer or ()),
        kv=kv,
        gate=gate,
        context=context,
        tokens=tokens,
        steps=steps,
        tune=tune,
        prefer=prefer,
        allow_regression=allow_regression,
        strict=strict,
        seed=seed,
        target=target,
    )
    source = open_checkpoint(model)
    judge = open_checkpoint(teacher) if teacher else None
    if dry_run:
        return console.plan(stage.plan(source, config, judge, text or ()), as_json=as_json)
    with console.progress(quiet=quiet) as progress:
        made = stage.replicate(
            source, output, config, judge, text or (), threads=threads, device=device, force=force, progress=progress
        )
    result = made.stages[-1]["result"]
    if not quiet:
        for note in result["notes"]:
            console.note(note)
        for warning in result.get("warnings", []):
            console.warn(warning)
    told, line = with_candidates(*console.written("replicate", output, made.manifest), result, output)
    return console.result(told, line, as_json=as_json, quiet=quiet)
