"""One run of a model: a request becomes tokens, a session and an answer, and what that took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rondel.cli import console
from rondel.cli.generate import Answer, Generation, tokenizer_of
from rondel.cli.options import CacheType
from rondel.converters.chat import Message, render
from rondel.converters.errors import RondelError
from rondel.converters.tokenizer import Tokenizer
from rondel.native import Model, Sampler, Session

DEFAULT_CONTEXT = 4096  # tokens, where the model can and nothing longer is needed: a longer cache costs memory


@dataclass(frozen=True)
class Request:
    """What to answer, where the answer ends, and how its tokens are chosen."""

    text: str
    chat: bool
    system: str | None
    echo: bool
    context: int | None
    limit: int | None  # tokens; None: until the context is full
    stop: tuple[str, ...]
    ignore_end: bool
    sampling: Mapping[str, Any]  # of Sampler


def answer(
    file: Path,
    request: Request,
    *,
    threads: int | None,
    kv: CacheType,
    replication: bool,
    quiet: bool,
    show: Callable[[str], None],
) -> dict[str, Any]:
    """The facts that `rondel run --json` prints; `show` gets the text as it comes."""
    started = time.perf_counter()
    with Model(file) as model:
        if not quiet:
            _warn(model, request.context)
        tokenizer = tokenizer_of(model)
        ids = _chat_ids(tokenizer, request.text, request.system) if request.chat else _text_ids(tokenizer, request.text)
        sampler = Sampler(**request.sampling)
        context = _context(model, request.context, len(ids), request.limit)
        with Session(model, context=context, threads=threads, kv=kv, replication=replication) as session:
            loaded = time.perf_counter() - started
            if request.echo:
                show(request.text)
            generation = Generation(
                session,
                tokenizer,
                sampler,
                limit=request.limit,
                stop=request.stop,
                ignore_end=request.ignore_end,
                show=show,
            )
            told = _told(generation.run(ids), len(ids), loaded, session)
            return told | {"seed": request.sampling["seed"], "context": session.context}


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
