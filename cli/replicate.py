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
from rondel.cli.replication_page import facts, render
from rondel.cli.report import check_report, write_report
from rondel.converters.errors import RondelError

Cache = Literal["own", "shared"]
LONGEST_RANGE = 9  # characters: no model has ten thousand layers

TeacherOption = Annotated[
    Path | None,
    typer.Option("--teacher", metavar="MODEL", help="The unquantized model, to fit and to judge by; with --text."),
]
TextOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="UTF-8 text: three pieces of it to fit on, choose by and judge by. Needs --teacher. May be repeated.",
    ),
]
LayerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--layer",
        metavar="N:MODE:COPIES[:OPTION]",
        help="Run layer N (from 0) COPIES more times: serial after itself, or parallel, merged by mean, sum or "
        "weighted_sum. May be repeated. Without it, layers are chosen, where there is a teacher and text.",
    ),
]
Mode = Literal["auto", "serial", "parallel", "mixed", "none"]
ModeOption = Annotated[
    Mode,
    typer.Option(
        "--mode",
        metavar="auto|serial|parallel|mixed|none",
        help="Of chosen copies: auto takes what helps a layer most, mixed allows both in one layer, none only tunes.",
    ),
]
CandidatesOption = Annotated[
    str | None,
    typer.Option("--layers", metavar="auto|LIST", help="Layers to choose from, such as 0,3-5. Default: all."),
]
Parts = Literal["auto", "block", "attn", "ffn"]
PartsOption = Annotated[
    Parts, typer.Option("--parts", metavar="auto|block|attn|ffn", help="What chosen copies run of a layer.")
]
PassesOption = Annotated[int, typer.Option("--passes", metavar="N", min=1, help="The most chosen copies of a layer.")]
Merge = Literal["sum", "mean", "weighted_sum"]
MergeOption = Annotated[
    Merge | None,
    typer.Option("--merge", metavar="sum|mean|weighted_sum", help="Of chosen parallel copies. Default: sum."),
]
Search = Literal["screen", "grid", "bayes", "evolve"]
SearchOption = Annotated[
    Search,
    typer.Option(
        "--search",
        metavar="screen|grid|bayes|evolve",
        help="How copies are looked for: layer by layer where screening promises something, or over whole plans.",
    ),
]
BudgetOption = Annotated[int, typer.Option("--budget-evals", metavar="N", min=1, help="The most plans to fit.")]
MostLayersOption = Annotated[
    int, typer.Option("--max-layers", metavar="N", min=0, help="The most layers with chosen copies.")
]
MostComputeOption = Annotated[
    float,
    typer.Option("--max-compute", metavar="SHARE", min=0, help="The most that chosen copies compute, of all layers'."),
]
MostCachesOption = Annotated[
    int | None,
    typer.Option("--max-kv", metavar="N", min=0, help="The most caches of keys and values of chosen copies."),
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
ReportOption = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE.html|FILE.json",
        help="Write a page that draws loss against compute and bytes for every candidate, or the facts behind it.",
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
    mode: ModeOption = "auto",
    candidates: CandidatesOption = None,
    parts: PartsOption = "auto",
    passes: PassesOption = 1,
    merge: MergeOption = None,
    search: SearchOption = "screen",
    budget_evals: BudgetOption = 24,
    max_layers: MostLayersOption = 2,
    max_compute: MostComputeOption = 1.0,
    max_kv: MostCachesOption = None,
    kv: CopiesCacheOption = None,
    gate: GateOption = None,
    context: ContextOption = None,
    tokens: TokensOption = 524288,
    steps: StepsOption = 150,
    tune: TuneOption = None,
    prefer: PreferOption = "none",
    allow_regression: AllowOption = False,
    strict: StrictOption = False,
    report: ReportOption = None,
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
    layer once; rondel runs them; `export --materialize` writes serial copies as layers.

    With --teacher and --text MODEL itself is tuned, and copies are chosen and fitted: on the tuned model, or tuned
    together with it. Text that neither fitted nor chose decides whether they stay; mostly none do. The copies of
    --layer are fitted as they are; those that harm are refused with exit code 3. Without a teacher and text, nothing
    is chosen, and --layer is written as it is.

    Example:

    \b
      rondel replicate quantized/ --teacher MODEL --text mine.txt --mode none -o tuned/
      rondel replicate quantized/ --teacher MODEL --text mine.txt --layer 2:serial:1 -o replicated/
      rondel replicate quantized/ --teacher MODEL --text mine.txt --report copies.html -o replicated/
      rondel replicate quantized/ --layer 1:parallel:2:mean -o replicated/
    """
    if report:
        check_report(report, dry_run=dry_run)
    from rondel.converters.checkpoint import open_checkpoint
    from rondel.quant import replicate as stage

    config = stage.ReplicateConfig(
        layers=tuple(layer or ()),
        mode=mode,
        candidates=_layers(candidates),
        parts=parts,
        passes=passes,
        merge=merge,
        search=search,
        budget_evals=budget_evals,
        max_layers=max_layers,
        max_compute=max_compute,
        max_kv=max_kv,
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
    if report:
        write_report(report, facts(made.manifest), render)
    result = made.stages[-1]["result"]
    if not quiet:
        for note in result["notes"]:
            console.note(note)
        for warning in result.get("warnings", []):
            console.warn(warning)
    told, line = with_candidates(*console.written("replicate", output, made.manifest), result, output)
    return console.result(told, line, as_json=as_json, quiet=quiet)


def _layers(text: str | None) -> tuple[int, ...] | None:
    """ "0,3-5" as (0, 3, 4, 5); None for "auto"."""
    if text in (None, "auto"):
        return None
    found: set[int] = set()
    for item in str(text).split(","):
        first, dash, last = item.partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)) or len(item) > LONGEST_RANGE:
            raise RondelError(f"--layers {text}: expected auto, or layers such as 0,3-5")
        found.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(found))
