"""`rondel bench`: how fast a GGUF file runs here, and how near that is to what the memory allows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import typer

from rondel.cli import console
from rondel.cli.options import FileArgument, JsonOption, QuietOption, ThreadsOption
from rondel.converters.progress import Progress

TOKEN_STEP = 97  # tokens of the measured text are i * TOKEN_STEP: spread over the vocabulary, the same every time


def bench(
    file: FileArgument,
    prompt: Annotated[
        int, typer.Option("--prompt", min=1, help="Tokens evaluated at once, for the prefill speed.")
    ] = 512,
    generate: Annotated[
        int, typer.Option("--generate", min=1, help="Tokens evaluated one by one, for the decode speed.")
    ] = 128,
    repeat: Annotated[int, typer.Option("--repeat", min=1, help="Measurements; the medians are reported.")] = 3,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure tokens a second, and the share of the memory bandwidth reached.

    Decoding reads every weight once a token, so the machine's own read bandwidth is the limit of its speed:
    bandwidth_share says how near it is. Small models live in the cache and may exceed 1.

    Example:

    \b
      rondel bench model.gguf --threads 2 --json
    """
    with console.progress(quiet=quiet) as progress:
        told = measure(file, prompt=prompt, generate=generate, repeat=repeat, threads=threads, progress=progress)
    console.result(told, console.lines(told), as_json=as_json, quiet=quiet)


def measure(
    path: Path, *, prompt: int, generate: int, repeat: int, threads: int | None, progress: Progress
) -> dict[str, Any]:
    """Medians of `repeat` runs: tokens a second, bytes a token, GB/s, and this machine's bandwidth beside them."""
    from rondel.native import Model, Session, instruction_set, read_bandwidth

    prefill, decode = [], []
    with Model(path) as model, Session(model, context=max(prompt, generate + 1), threads=threads) as session:
        tokens = [i * TOKEN_STEP % model.vocabulary for i in range(prompt)]
        session.eval(tokens[:1], 0)  # the first touch of every page is not what is measured
        for done in range(repeat):
            progress(done, repeat, "bench")
            prefill.append(prompt / _seconds(lambda: session.prefill(tokens, 0)))
            session.eval(tokens[:1], 0)
            read = 0

            def generated() -> None:
                nonlocal read
                for i in range(generate):
                    session.eval([i * TOKEN_STEP % model.vocabulary])
                    read += session.bytes_read

            decode.append(generate / _seconds(generated))
        progress(repeat, repeat, "bench")
        told: dict[str, Any] = {
            "file": str(path),
            "threads": session.threads,
            "isa": instruction_set(),
            "prompt": prompt,
            "generate": generate,
            "prefill_tokens_per_second": median(prefill),
            "decode_tokens_per_second": median(decode),
            "bytes_per_token": read // generate,
        }
        bandwidth = read_bandwidth(session.threads)
    rate = told["bytes_per_token"] * told["decode_tokens_per_second"]
    return told | {
        "gigabytes_per_second": rate / 1e9,
        "machine_gigabytes_per_second": bandwidth / 1e9,
        "bandwidth_share": rate / bandwidth,
    }


def _seconds(work: Callable[[], None]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start
