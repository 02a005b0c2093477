"""`rondel run`: continues a text, or answers a message, with a GGUF model; the text streams to standard output."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from rondel.cli import console
from rondel.cli.options import (
    CacheOption,
    FileArgument,
    JsonOption,
    QuietOption,
    ReplicationOption,
    ThreadsOption,
)
from rondel.converters.errors import RondelError

INTERRUPTED = 130

PromptOption = Annotated[str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The text to continue.")]
PromptFileOption = Annotated[
    Path | None,
    typer.Option("--file", "-f", metavar="FILE", help="Read it from a file (- or neither: from standard input)."),
]
ChatOption = Annotated[bool, typer.Option("--chat", help="Answer it as a message, with the model's chat template.")]
SystemOption = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="With --chat: the system message before it.")
]
TokensOption = Annotated[
    int, typer.Option("--tokens", "-n", min=-1, help="The most tokens to generate; -1: until the context is full.")
]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", min=0.0, help="Randomness: 0 always takes the likeliest token.")
]
TopKOption = Annotated[
    int, typer.Option("--top-k", min=0, help="Choose among this many of the likeliest tokens; 0: all.")
]
TopPOption = Annotated[
    float, typer.Option("--top-p", min=0.0, max=1.0, help="Choose among the likeliest that reach this probability.")
]
MinPOption = Annotated[
    float,
    typer.Option("--min-p", min=0.0, max=1.0, help="Leave out what is less likely than this share of the best."),
]
RepeatPenaltyOption = Annotated[
    float,
    typer.Option("--repeat-penalty", min=0.0, help="Above 1: tokens that were there lately become less likely."),
]
RepeatLastOption = Annotated[int, typer.Option("--repeat-last", min=0, help="How many tokens back that looks.")]
SamplingSeedOption = Annotated[
    int, typer.Option("--seed", help="Of the choice among tokens: the same seed gives the same text.")
]
StopOption = Annotated[
    list[str] | None,
    typer.Option("--stop", metavar="TEXT", help="End before this text; may be given several times."),
]
IgnoreEosOption = Annotated[bool, typer.Option("--ignore-eos", help="Never choose a token that ends the text.")]
EchoOption = Annotated[bool, typer.Option("--echo", help="Print the prompt before its continuation.")]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--context",
        "-c",
        min=1,
        help="Tokens of prompt and text together. Default: what they need, 4096 or more.",
    ),
]


def run(
    file: FileArgument,
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    chat: ChatOption = False,
    system: SystemOption = None,
    tokens: TokensOption = 512,
    temperature: TemperatureOption = 0.8,
    top_k: TopKOption = 40,
    top_p: TopPOption = 0.95,
    min_p: MinPOption = 0.05,
    repeat_penalty: RepeatPenaltyOption = 1.0,
    repeat_last: RepeatLastOption = 64,
    seed: SamplingSeedOption = 0,
    stop: StopOption = None,
    ignore_eos: IgnoreEosOption = False,
    echo: EchoOption = False,
    context: ContextOption = None,
    threads: ThreadsOption = None,
    kv: CacheOption = "auto",
    replication: ReplicationOption = True,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Continue a text with a GGUF model.

    The text goes to standard output as it is made, statistics go to standard error. One newline at the end of a file
    or of standard input does not count. The seed is 0 unless given, so the same command prints the same text.

    Example:

    \b
      rondel run model.gguf -p "Once upon a time" -n 200
      rondel run model.gguf --chat -p "Why is the sky blue?" --temperature 0
      rondel run model.gguf -f question.txt --json | jq -r .text
    """
    text = _prompt_text(prompt, prompt_file)
    if system is not None and not chat:
        raise typer.BadParameter("--system needs --chat: a text to continue has no system message")
    from rondel.cli.answer import Request, answer

    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repeat_penalty": repeat_penalty,
        "repeat_last": repeat_last,
        "seed": seed,
    }
    limit = None if tokens < 0 else tokens
    request = Request(text, chat, system, echo, context, limit, tuple(stop or ()), ignore_eos, sampling)
    show = _silent if as_json else _show
    told = answer(file, request, threads=threads, kv=kv, replication=replication, quiet=quiet, show=show)
    if as_json:
        console.result(told, "", as_json=True, quiet=quiet)
    else:
        print(flush=True)
    if not quiet:
        print(_statistics(told), file=sys.stderr)
    if told["stop"] == "interrupted":
        raise typer.Exit(INTERRUPTED)


def _prompt_text(prompt: str | None, path: Path | None) -> str:
    """From the option, else from the file, else from standard input; a final newline of the last two is left out."""
    if prompt is not None:
        if path is not None:
            raise typer.BadParameter("--prompt and --file exclude each other: give one")
        return prompt
    if path is None and sys.stdin.isatty():
        raise typer.BadParameter("no text to continue: give --prompt TEXT or --file FILE, or pipe it in")
    if path is None or str(path) == "-":
        data = sys.stdin.buffer.read()
    else:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RondelError(f"{path}: cannot be read: {error.strerror}") from error
    return data.decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")


def _statistics(told: dict[str, Any]) -> str:
    from rondel.cli.generate import REASONS

    def rate(value: float | None) -> str:
        return "" if value is None else f" ({value:.1f} tokens/s)"

    read = told["bytes_per_token"]
    return (
        f"prompt: {told['prompt_tokens']} tokens in {told['prompt_seconds']:.2f} s"
        f"{rate(told['prompt_tokens_per_second'])}; "
        f"text: {told['tokens']} tokens in {told['seconds']:.2f} s{rate(told['tokens_per_second'])}"
        + (f", {console.size(read)} read a token" if read else "")
        + f"; ended: {REASONS[told['stop']]}"
    )


def _show(text: str) -> None:
    # A terminal that cannot show a character gets a question mark instead of an error.
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)


def _silent(text: str) -> None:
    """With --json the text comes at the end, inside the object."""
