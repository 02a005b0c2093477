"""`rondel quantize`: options to QuantizeConfig, one call, one report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rondel.cli import comparison, console
from rondel.cli.options import (
    DeviceOption,
    DryRunOption,
    ForceOption,
    JobsOption,
    JsonOption,
    ModelArgument,
    QuietOption,
    StatsOption,
    TargetOption,
    UnusedSeedOption,
    parse_size,
)
from rondel.cli.report import check_report, render, write_report
from rondel.converters.errors import RondelError

FolderOption = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="The folder to write; it appears when it is complete. With --compare: keeps a model of each method.",
    ),
]
TypeOption = Annotated[
    str | None,
    typer.Option(
        "--type",
        metavar="TYPE",
        help="A mixture such as Q4_K_M or a format such as Q4_K, Q2_K, U4-128. Default: Q4_K_M.",
    ),
]
BitsOption = Annotated[
    float | None,
    typer.Option(
        "--bpw",
        metavar="BITS",
        help="Instead of --type: the formats that lose least at so many bits a weight. Needs --stats.",
    ),
]
SizeOption = Annotated[
    str | None, typer.Option("--size", metavar="SIZE", help="The same, for a GGUF file of at most 900M, 2.5G, ...")
]
LikeOption = Annotated[
    str | None,
    typer.Option("--like", metavar="TYPE", help="The same, for a file as large as llama.cpp's mixture, or smaller."),
]
ImatrixOption = Annotated[
    Path | None, typer.Option("--imatrix", metavar="FILE", help="An imatrix GGUF of llama.cpp, instead of --stats.")
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="METHOD",
        help="rtn: round to nearest. imatrix: columns count by their statistics. gptq: error feedback as well. "
        "awq+ or smoothquant+ in front folds channel scales into norms and earlier linears; awq alone means "
        "awq+imatrix. auto tries all on some layers. Default: gptq where --stats hold their text, else "
        "imatrix; behind awq where rotate measured for this type that scales pay.",
    ),
]
GranularityOption = Annotated[
    Literal["group", "channel", "tensor"],
    typer.Option(
        "--granularity",
        metavar="group|channel|tensor",
        help="With rtn: which weights share a scale. Q4_0, Q5_0, Q8_0, U2, U4 and U8 round symmetrically, Q4_1 and "
        "Q5_1 with an offset; the other formats know groups alone.",
    ),
]
AlphaOption = Annotated[
    float | None,
    typer.Option(
        "--alpha",
        metavar="0..1",
        help="How far awq or smoothquant scales. Default: awq measures it group by group, smoothquant takes 0.5.",
    ),
]
SequentialOption = Annotated[
    bool,
    typer.Option(
        "--sequential/--no-sequential",
        help="With gptq: calibrate each matrix behind the ones that are rounded already, or on the float model.",
    ),
]
AsymmetricOption = Annotated[
    bool,
    typer.Option(
        "--asymmetric/--no-asymmetric",
        help="With gptq: let each matrix make up for what the ones before it lost. Runs the float model too.",
    ),
]
PureOption = Annotated[bool, typer.Option("--pure", help="The same format for every matrix.")]
TensorOption = Annotated[
    list[str] | None,
    typer.Option(
        "--tensor",
        metavar="PATTERN=FORMAT",
        help="For matrices whose name matches PATTERN, a regular expression. May be repeated.",
    ),
]
EmbeddingTypeOption = Annotated[
    str | None, typer.Option("--embedding-type", metavar="FORMAT", help="Of the token embedding.")
]
OutputTypeOption = Annotated[
    str | None, typer.Option("--output-type", metavar="FORMAT", help="Of the head that makes the logits.")
]
ReportOption = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE",
        help="Write what became of every tensor: a page (.html), or its facts (.json).",
    ),
]
CompareOption = Annotated[
    bool, typer.Option("--compare", help="Quantize by every method, print one table, and need no -o.")
]
MethodsOption = Annotated[
    str | None,
    typer.Option("--methods", metavar="A,B,...", help="With --compare: these. Default: all that can be used."),
]


def parse_override(text: str) -> tuple[str, str]:
    """ "ffn_down=Q4_K" as (pattern, format)."""
    pattern, equals, format_ = text.rpartition("=")
    if not (pattern and equals and format_):
        raise RondelError(f"--tensor {text}: expected PATTERN=FORMAT, such as 'ffn_down=Q4_K'")
    return pattern, format_


def quantize(
    model: ModelArgument,
    output: FolderOption = None,
    type_: TypeOption = None,
    bpw: BitsOption = None,
    size: SizeOption = None,
    like: LikeOption = None,
    stats: StatsOption = None,
    imatrix: ImatrixOption = None,
    method: MethodOption = None,
    granularity: GranularityOption = "group",
    alpha: AlphaOption = None,
    sequential: SequentialOption = True,
    asymmetric: AsymmetricOption = True,
    pure: PureOption = False,
    tensor: TensorOption = None,
    embedding_type: EmbeddingTypeOption = None,
    output_type: OutputTypeOption = None,
    report: ReportOption = None,
    compare: CompareOption = False,
    methods: MethodsOption = None,
    seed: UnusedSeedOption = 0,
    target: TargetOption = None,
    jobs: JobsOption = None,
    device: DeviceOption = "cpu",
    force: ForceOption = False,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Round the weights of MODEL to block formats.

    The scales of each block are searched for the smallest error, weighted by what calibrate saw. Where the statistics
    hold the text they were measured on, the model runs on it, and each column makes up for what the ones before it
    lost; text that is held out decides for each matrix whether that is better. Rows that do not fit
    a format's blocks fall back to the format that llama.cpp would take, and the report says so. With --bpw, --size or
    --like every matrix gets a format of its own: the model runs to learn how much each matrix's errors count.

    Example:

    \b
      rondel quantize MODEL --stats calib/ --type Q4_K_M -o quantized/
      rondel quantize MODEL --type Q2_K --tensor ffn_down=Q4_K -o quantized/
      rondel quantize MODEL --stats calib/ --type Q2_K --compare --methods imatrix,awq
      rondel quantize MODEL --stats calib/ --size 900M --dry-run -o quantized/
    """
    from rondel.converters.checkpoint import open_checkpoint
    from rondel.converters.stats import stats_for
    from rondel.quant import quantize as stage
    from rondel.quant.importance import open_imatrix

    _check_output(output, compare=compare, methods=methods, single=bool(method or dry_run or report))
    if stats and imatrix:
        raise RondelError("--stats and --imatrix say the same thing twice; give one of them")
    config = stage.QuantizeConfig(
        type=type_,
        bpw=bpw,
        size=parse_size("--size", size) if size else None,
        like=like,
        method=method,
        granularity=granularity,
        alpha=alpha,
        sequential=sequential,
        asymmetric=asymmetric,
        pure=pure,
        tensors=tuple(parse_override(text) for text in tensor or ()),
        embedding_type=embedding_type,
        output_type=output_type,
        target=target,
        seed=seed,
    )
    if report:
        check_report(report, dry_run=dry_run)
    source = open_checkpoint(model)
    given = source, config, open_imatrix(imatrix) if imatrix else stats_for(source, stats)
    running: dict[str, Any] = {"threads": jobs, "device": device}
    if compare:
        told = comparison.measure(*given, methods=methods, out=output, quiet=quiet, force=force, **running)
        return console.result(told, comparison.text(told), as_json=as_json, quiet=quiet)
    assert output is not None
    if dry_run:
        with console.progress(quiet=quiet) as progress:
            planned = stage.plan(*given, progress=progress, **running)
        return console.plan(planned, as_json=as_json)
    with console.progress(quiet=quiet) as progress:
        made = stage.quantize(source, output, *given[1:], force=force, progress=progress, **running)
    _tell(made.manifest, report, quiet=quiet)
    return console.result(*console.written("quantize", output, made.manifest), as_json=as_json, quiet=quiet)


def _check_output(output: Path | None, *, compare: bool, methods: str | None, single: bool) -> None:
    """One model is written, or several are compared; `single`: an option is there that makes sense for one."""
    if methods is not None and not compare:
        raise typer.BadParameter("--methods names what to --compare; one method alone is --method")
    if compare and single:
        raise typer.BadParameter("--compare takes --methods, and neither --method nor --dry-run nor --report")
    if output is None and not compare:
        raise typer.BadParameter("there is no folder to write: give -o DIR")


def _tell(manifest: dict[str, Any], report: Path | None, *, quiet: bool) -> None:
    """Write the report, and say on standard error what did not go as asked: warnings, matrices of another format."""
    from rondel.quant.report import fallbacks, report_of

    if report:
        write_report(report, report_of(manifest), render)
    if not quiet:
        quantization = manifest["quantization"]
        for sentence in [*quantization["warnings"], *fallbacks(quantization["tensors"].values())]:
            console.warn(sentence)
