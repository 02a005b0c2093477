"""`rondel replicate`: options to ReplicateConfig, one call, one report."""

from __future__ import annotations

from pathlib import Path
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
    TargetOption,
    ThreadsOption,
)

Mode = Literal["auto", "serial", "parallel", "mixed", "none"]
Parts = Literal["auto", "block", "ffn", "attn"]
Merge = Literal["sum", "mean", "weighted_sum"]
Cache = Literal["own", "shared"]
Search = Literal["screen", "grid", "bayes", "evolve"]
Prefer = Literal["none", "replicate", "low-rank"]

TeacherOption = Annotated[
    Path | None,
    typer.Option("--teacher", metavar="MODEL", help="The unquantized model, to fit and to judge by. Needs --text."),
]
TextOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="UTF-8 text: a part of it fits, another chooses, a third decides. Needs --teacher. May be repeated.",
    ),
]
LayerOption = Annotated[
    list[str] | None,
    typer.Option(
        "--layer",
        metavar="N:MODE:COPIES[:OPTION]",
        help="Run layer N (from 0) COPIES more times: serial after itself, or parallel, merged by mean, sum or "
        "weighted_sum. May be repeated. Without it, rondel chooses.",
    ),
]
ModeOption = Annotated[
    Mode,
    typer.Option(
        "--mode",
        metavar="auto|serial|parallel|mixed|none",
        help="How layers may run again: after themselves, beside themselves, both. none tunes the single copy alone.",
    ),
]
LayersOption = Annotated[
    str,
    typer.Option(
        "--layers", metavar="auto|LIST", help="Where to look, such as 2,5,8-11. With a --mode, those layers are taken."
    ),
]
PartsOption = Annotated[
    Parts, typer.Option("--parts", metavar="auto|block|ffn|attn", help="What of a layer runs again.")
]
PassesOption = Annotated[
    int, typer.Option("--passes", metavar="N", min=2, help="The most executions of a layer, the first one counted.")
]
MergeOption = Annotated[
    Merge | None,
    typer.Option("--merge", metavar="sum|mean|weighted_sum", help="How fitted parallel copies add up. Default: sum."),
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
SearchOption = Annotated[
    Search,
    typer.Option(
        "--search",
        metavar="screen|grid|bayes|evolve",
        help="How candidates are found: by one closed-form pass over the layers, or by an optimizer that fits many.",
    ),
]
BudgetOption = Annotated[
    int, typer.Option("--budget-evals", metavar="N", min=1, help="The most candidates that a search fits.")
]
MaxLayersOption = Annotated[
    float,
    typer.Option("--max-layers", metavar="N", min=0, help="The most layers that run again: a share, or 1, 2, ..."),
]
MaxComputeOption = Annotated[
    float, typer.Option("--max-compute", metavar="FACTOR", min=1, help="The most work, where 1 is every layer once.")
]
MaxCacheOption = Annotated[
    float, typer.Option("--max-kv", metavar="FACTOR", min=1, help="The most keys and values, counted alike.")
]
ContextOption = Annotated[
    int | None,
    typer.Option("--context", "-c", metavar="N", min=2, help="Tokens of a window. Default: 512, or what MODEL has."),
]
TokensOption = Annotated[int, typer.Option("--tokens", metavar="N", min=1, help="The most of the text to use.")]
StepsOption = Annotated[int, typer.Option("--steps", metavar="N", min=0, help="Of every optimization.")]
TuneOption = Annotated[
    bool,
    typer.Option(
        "--tune/--no-tune", help="Fit block scales and norms first: the same bytes, and what copies are measured by."
    ),
]
PreferOption = Annotated[
    Prefer,
    typer.Option(
        "--prefer",
        metavar="none|replicate|low-rank",
        help="replicate: copies also where other uses of the bytes gain more. low-rank: a correction of the matrices "
        "instead, written as lora.gguf.",
    ),
]
RankOption = Annotated[int, typer.Option("--rank", metavar="N", min=1, help="Of that correction.")]
AllowOption = Annotated[
    bool,
    typer.Option("--allow-regression", help="Write copies that make the model worse; the file says so. Else: exit 3."),
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Programs that cannot run the copies shall refuse the file.")
]
ReportOption = Annotated[
    Path | None,
    typer.Option(
        "--report", metavar="FILE", help="Write what was tried: a page with a picture (.html), or its facts (.json)."
    ),
]


def replicate(
    model: ModelArgument,
    output: OutputOption,
    layer: LayerOption = None,
    teacher: TeacherOption = None,
    text: TextOption = None,
    mode: ModeOption = "auto",
    layers: LayersOption = "auto",
    parts: PartsOption = "auto",
    passes: PassesOption = 2,
    merge: MergeOption = None,
    kv: CopiesCacheOption = None,
    gate: GateOption = None,
    search: SearchOption = "screen",
    budget_evals: BudgetOption = 40,
    max_layers: MaxLayersOption = 0.25,
    max_compute: MaxComputeOption = 1.25,
    max_kv: MaxCacheOption = 1.25,
    context: ContextOption = None,
    tokens: TokensOption = 131072,
    steps: StepsOption = 150,
    tune: TuneOption = True,
    prefer: PreferOption = "none",
    rank: RankOption = 8,
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
    layer once; rondel runs them; `export --materialize` writes serial copies as layers. With --teacher and --text the
    single copy is tuned first, then copies are fitted, and text that neither fitted nor chose them decides: often the
    answer is none. Without, --layer writes copies that nobody fitted.

    Example:

    \b
      rondel replicate quantized/ --teacher MODEL --text mine.txt --report tried.html -o replicated/
      rondel replicate quantized/ --teacher MODEL --text mine.txt --mode serial --layers 2,5 --parts ffn -o replicated/
      rondel replicate quantized/ --layer 1:parallel:2:mean -o replicated/
    """
    from rondel.converters.checkpoint import open_checkpoint
    from rondel.quant import replicate as stage

    config = stage.ReplicateConfig(
        layer=tuple(layer or ()),
        mode=mode,
        layers=layers,
        parts=parts,
        passes=passes,
        merge=merge,
        kv=kv,
        gate=gate,
        search=search,
        budget_evals=budget_evals,
        max_layers=max_layers,
        max_compute=max_compute,
        max_kv=max_kv,
        context=context,
        tokens=tokens,
        steps=steps,
        tune=tune,
        prefer=prefer,
        rank=rank,
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
    _tell(made.stages[-1]["result"], report, quiet=quiet)
    return console.result(*console.written("replicate", output, made.manifest), as_json=as_json, quiet=quiet)


def _tell(result: dict[str, Any], report: Path | None, *, quiet: bool) -> None:
    """Say on standard error what did not go as asked, and write the report."""
    if not quiet:
        for note in result["notes"]:
            console.warn(note)
