"""`rondel run`: continues a text, or answers a message, with a GGUF model; the text streams to standard output."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rondel.cli import console
from rondel.cli.options import CacheOption, FileArgument, JsonOption, QuietOption, ReplicationOption, ThreadsOption
from rondel.converters.errors import RondelError

if TYPE_CHECKING:
    from rondel.cli.generate import Answer
    from rondel.converters.tokenizer import Tokenizer
    from rondel.native import Model, Session

DEFAULT_CONTEXT = 4096  # tokens, where the model can and nothing longer is needed: a longer cache costs memory
INTERRUPTED = 130


def run(
    file: FileArgument,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The text to continue.")] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="FILE", help="Read it from a file (- or neither: from standard input)."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Answer it as a message, with the model's chat template.")
    ] = False,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="With --chat: the system message before it.")
    ] = None,
    tokens: Annotated[
        int, typer.Option("--tokens", "-n", min=-1, help="The most tokens to generate; -1: until the context is full.")
    ] = 512,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="Randomness: 0 always takes the likeliest token.")
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option("--top-k", min=0, help="Choose among this many of the likeliest tokens; 0: all.")
    ] = 40,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0.0, max=1.0, help="Choose among the likeliest that reach this probability.")
    ] = 0.95,
    min_p: Annotated[
        float,
        typer.Option("--min-p", min=0.0, max=1.0, help="Leave out what is less likely than this share of the best."),
    ] = 0.05,
    repeat_penalty: Annotated[
        float,
        typer.Option("--repeat-penalty", min=0.0, help="Above 1: tokens that were there lately become less likely."),
    ] = 1.0,
    repeat_last: Annotated[int, typer.Option("--repeat-last", min=0, help="How many tokens back that looks.")] = 64,
    seed: Annotated[
        int, typer.Option("--seed", help="Of the choice among tokens: the same seed gives the same text.")
    ] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="End before this text; may be given several times."),
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Never choose a token that ends the text.")] = False,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before its continuation.")] = False,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            "-c",
            min=1,
            help="Tokens of prompt and text together. Default: what they need, 4096 or more.",
        ),
    ] = None,
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
    from rondel.cli.generate import Generation, tokenizer_of
    from rondel.native import Model, Sampler, Session

    started = time.perf_counter()
    with Model(file) as model:
        if not quiet:
            _warn(model, context)
        tokenizer = tokenizer_of(model)
        ids = _chat_ids(tokenizer, text, system) if chat else _text_ids(tokenizer, text)
        limit = None if tokens < 0 else tokens
        sampler = Sampler(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            repeat_last=repeat_last,
            seed=seed,
        )
        with Session(
            model, context=_context(model, context, len(ids), limit), threads=threads, kv=kv, replication=replication
        ) as session:
            loaded = time.perf_counter() - started
            show = _silent if as_json else _show
            if echo:
                show(text)
            generation = Generation(
                session, tokenizer, sampler, limit=limit, stop=stop or (), ignore_end=ignore_eos, show=show
            )
            answer = generation.run(ids)
            told = _told(answer, len(ids), loaded, session) | {"seed": seed, "context": session.context}
    if as_json:
        console.result(told, "", as_json=True, quiet=quiet)
    else:
        print(flush=True)
    if not quiet:
        print(_statistics(told), file=sys.stderr)
    if answer.reason == "interrupted":
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


def _warn(model: Model, context: int | None) -> None:
    for warning in model.warnings:
        console.warn(warning)
    if context is not None and context > model.context:
        console.warn(f"--context {context}: the model was trained with {model.context}, text beyond that may go astray")


def _text_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The prompt's tokens: the begin token where the model wants one, no end token, special tokens by their names."""
    begin = [tokenizer.bos] if tokenizer.add_bos and tokenizer.bos is not None else []
    ids = tokenizer.encode(text, add_special=False, parse_special=True)
    if not begin and not ids:
        raise RondelError("the prompt is empty, and this model has no token to begin a text with: give some text")
    return [*begin, *ids] if ids[:1] != begin else ids


def _chat_ids(tokenizer: Tokenizer, text: str, system: str | None) -> list[int]:
    from rondel.converters.chat import Message, render

    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": text})

    def name(token: int | None) -> str:
        return "" if token is None else tokenizer.tokens[token]

    return _text_ids(
        tokenizer, render(tokenizer.chat_template, messages, begin=name(tokenizer.bos), end=name(tokenizer.eos))
    )


def _context(model: Model, asked: int | None, prompt: int, limit: int | None) -> int:
    """The tokens the session remembers; refuses a prompt that leaves no room for an answer."""
    room = asked
    if room is None:
        needed = model.context if limit is None else prompt + limit
        room = min(model.context, max(DEFAULT_CONTEXT, needed))
    if prompt > room:
        raise RondelError(
            f"the prompt has {prompt} tokens, the context holds {room}: "
            f"shorten it or give --context (the model was trained with {model.context})"
        )
    return room


def _told(answer: Answer, prompt_tokens: int, loaded: float, session: Session) -> dict[str, Any]:
    """What --json prints; rates are null where nothing was measured."""
    return {
        "text": answer.text,
        "stop": answer.reason,
        "tokens": len(answer.ids),
        "prompt_tokens": prompt_tokens,
        "ids": answer.ids,
        "load_seconds": loaded,
        "prompt_seconds": answer.prompt_seconds,
        "seconds": answer.seconds,
        "prompt_tokens_per_second": prompt_tokens / answer.prompt_seconds if answer.prompt_seconds else None,
        "tokens_per_second": answer.steps / answer.seconds if answer.steps else None,
        "bytes_per_token": round(answer.bytes_read / answer.steps) if answer.steps else None,
        "memory_bytes": session.memory,
    }


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
