"""`rondel eval`: perplexity of a text under a GGUF model, and how far its predictions are from another model's."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rondel.cli import console
from rondel.cli.options import (
    CacheOption,
    CacheType,
    FileArgument,
    JsonOption,
    QuietOption,
    ReplicationOption,
    ThreadsOption,
)
from rondel.converters.errors import RondelError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from rondel.converters.logits import LogitsWriter


def eval(
    file: FileArgument,
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help="The text to predict. With --base: its own, if not given."),
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", "-c", min=3, help="Tokens of a window. Default: 512, or what --base has.")
    ] = None,
    chunks: Annotated[int | None, typer.Option("--chunks", min=1, help="Only the first windows of the text.")] = None,
    save_base: Annotated[
        Path | None,
        typer.Option(
            "--save-base", metavar="FILE", help="Write this model's log-probabilities, to compare others with."
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option("--base", metavar="FILE", help="Compare with what --save-base wrote of another model."),
    ] = None,
    threads: ThreadsOption = None,
    kv: CacheOption = "auto",
    replication: ReplicationOption = True,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure perplexity, and the divergence from another model's logits.

    The text is cut into windows of --context tokens, and the second half of each is scored, as llama.cpp's perplexity
    tool does; its files of logits are the same too. nll and the divergences are in nats a token.

    Example:

    \b
      rondel eval f16.gguf --text wiki.txt --context 512 --save-base logits.bin
      rondel eval q4.gguf --text wiki.txt --context 512 --base logits.bin --json
    """
    if text is None and base is None:
        raise typer.BadParameter("no text: give --text FILE, or --base FILE to take the text it was made of")
    if base is not None and save_base is not None and base.absolute() == save_base.absolute():
        raise typer.BadParameter("--base and --save-base name the same file: it cannot be read and written at once")
    with console.progress(quiet=quiet) as progress:
        told = measure(
            file,
            text=text,
            context=context,
            chunks=chunks,
            save_base=save_base,
            base=base,
            threads=threads,
            kv=kv,
            replication=replication,
            progress=progress,
        )
    console.result(told, _text(told), as_json=as_json, quiet=quiet)


def measure(
    path: Path,
    *,
    text: Path | None,
    context: int | None,
    chunks: int | None,
    save_base: Path | None,
    base: Path | None,
    threads: int | None,
    kv: CacheType,
    replication: bool,
    progress: Any,
) -> dict[str, Any]:
    """The facts that `rondel eval --json` prints."""
    from rondel.cli.generate import tokenizer_of
    from rondel.converters.logits import LogitsFile
    from rondel.native import Model, Session
    from rondel.quant.perplexity import check_base, perplexity, windows

    started = time.perf_counter()
    content = None if text is None else _read(text)
    compared = None if base is None else LogitsFile(base)
    with ExitStack() as stack:
        model = stack.enter_context(Model(path))
        if context is None:
            context = compared.context if compared else 512
        elif compared and text is None and context != compared.context:
            raise RondelError(f"--context {context}: {base} has windows of {compared.context} tokens; leave it out")
        tokenizer = tokenizer_of(model)
        cut = None if content is None else windows(tokenizer.encode(content), context, chunks)
        if compared:
            cut = check_base(compared, cut, model.vocabulary, chunks)
        assert cut is not None
        session = stack.enter_context(
            Session(model, context=context, batch=context, threads=threads, kv=kv, replication=replication)
        )

        def evaluate(window: NDArray[np.int32], first: int) -> NDArray[np.float32]:
            session.prefill(window[:first], 0)
            return session.eval(window[first:], all=True)

        save = stack.enter_context(_writer(save_base, cut, model.vocabulary)) if save_base else None
        begin = tokenizer.bos if tokenizer.add_bos else None
        told = perplexity(cut, evaluate, begin=begin, base=compared, save=save, progress=progress)
    return told | {"seconds": time.perf_counter() - started}


def _read(path: Path) -> str:
    """The text; one newline at its end is left out, as llama.cpp does."""
    try:
        return path.read_bytes().decode("utf-8", "replace").removesuffix("\n")
    except OSError as error:
        raise RondelError(f"{path}: cannot be read: {error.strerror}") from error


def _writer(path: Path, cut: NDArray[np.int32], vocabulary: int) -> LogitsWriter:
    from rondel.converters.logits import LogitsWriter, file_bytes

    count, context = cut.shape
    needed = file_bytes(count, context, vocabulary)
    if path.absolute().parent.is_dir():
        free = shutil.disk_usage(path.absolute().parent).free
        if needed > free:
            raise RondelError(
                f"{path}: the logits take {console.size(needed)}, the disk has {console.size(free)}: use fewer --chunks"
            )
    return LogitsWriter(path, cut, vocabulary)


def _text(told: dict[str, Any]) -> str:
    lines = [
        f"perplexity  {told['perplexity']:.4f} ± {told['uncertainty']:.4f}",
        f"nll         {told['nll']:.5f} nats a token",
        f"tokens      {told['tokens']} scored in {told['windows']} windows of {told['context']}",
        f"time        {told['seconds']:.1f} s",
    ]
    if "mean_kl" in told:
        lines += [
            f"mean KL     {told['mean_kl']:.6f} ± {told['mean_kl_uncertainty']:.6f} nats a token",
            f"median KL   {told['median_kl']:.6f}",
            f"99.9 % KL   {told['kl_99_9']:.6f}",
            f"same top    {100 * told['same_top']:.3f} %",
            f"base        perplexity {told['base_perplexity']:.4f}",
        ]
    return "\n".join(lines)
