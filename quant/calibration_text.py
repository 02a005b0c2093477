"""Owns how text becomes calibration windows: tokenized as the runtime does, cut to one length, chosen by the seed."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch

from rondel.converters.chat import render
from rondel.converters.checkpoint import Checkpoint
from rondel.converters.errors import RondelError
from rondel.converters.tokenizer import Tokenizer
from rondel.converters.vocabulary import vocabulary_keys

# Three line ends or more stand between two documents of a text file; only the chat template has to know.
DOCUMENT_GAP = re.compile(r"\n{3,}")
# What a chat template's clock shows: the same text must give the same tokens every day.
CLOCK = datetime(2024, 1, 1)


@dataclass(frozen=True)
class CalibrationText:
    """Token ids (windows, context) int64 in the order they are run, and the names of the files they came from."""

    windows: torch.Tensor
    names: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Tokens in all windows."""
        return self.windows.numel()

    def sha256(self) -> str:
        """A hash of the windows: of what was run, not of the files."""
        shape = f"{tuple(self.windows.shape)}".encode()
        return hashlib.sha256(shape + self.windows.to(torch.int32).numpy().tobytes()).hexdigest()


def _encode(tokenizer: Tokenizer, text: str, chat: bool) -> list[int]:
    if not chat:
        return tokenizer.encode(text, add_special=False, parse_special=True)
    begin, end = (tokenizer.tokens[i] if i is not None else "" for i in (tokenizer.bos, tokenizer.eos))
    ids: list[int] = []
    for document in DOCUMENT_GAP.split(text):
        if document.strip():
            turn = render(
                tokenizer.chat_template,
                [{"role": "user", "content": document.strip()}],
                begin=begin,
                end=end,
                answer=False,
                now=CLOCK,
            )
            ids += tokenizer.encode(turn, add_special=False, parse_special=True)
    return ids


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RondelError(
            f"{path}: cannot be read as UTF-8 text ({getattr(error, 'strerror', None) or error})"
        ) from error


def _chosen(count: int, wanted: int, seed: int | None) -> list[int]:
    """The windows of a seed, in its order: those whose hashes are smallest. None: evenly spread, in the text's."""
    if seed is None:
        taken = min(count, wanted)
        return [i * count // taken for i in range(taken)]
    return sorted(range(count), key=lambda i: hashlib.sha256(f"rondel windows 1|{seed}|{i}".encode()).digest())[:wanted]


def tokenize(
    source: Checkpoint, text: Sequence[Path], *, tokens: int, context: int, seed: int | None, chat: bool = False
) -> CalibrationText:
    """Windows of `context` tokens from text files, at most `tokens` in all, with a begin token where models want it.

    `seed` chooses and orders the windows; None keeps the order of the text. Special tokens in the text are read as
    such; `chat` wraps every document (three line ends stand between two) in the model's template. Raises
    RondelError for text that does not fill one window.
    """
    numbers = source.numbers
    if not 2 <= context <= numbers.context:
        raise RondelError(
            f"{source.root}: the context must be 2 to {numbers.context} tokens, got {context}; use --context"
        )
    if tokens < context:
        raise RondelError(f"{tokens} tokens do not fill one window of {context}; raise --tokens or lower --context")
    if not text:
        raise RondelError("calibration needs text; give at least one file with --text")
    tokenizer = Tokenizer(vocabulary_keys(source.side_files(), numbers.vocabulary, family=source.family.name))
    ids = [token for path in text for token in _encode(tokenizer, _read(path), chat)]
    begin = [tokenizer.bos] if tokenizer.add_bos and tokenizer.bos is not None else []
    length = context - len(begin)
    count = len(ids) // length
    if count == 0:
        raise RondelError(
            f"{text[0]}: the text has {len(ids)} tokens, one window takes {length}; use more text or less --context"
        )
    chosen = _chosen(count, tokens // context, seed)
    windows = torch.tensor([begin + ids[i * length : (i + 1) * length] for i in chosen], dtype=torch.int64)
    if int(windows.max()) >= numbers.vocabulary:
        raise RondelError(
            f"{source.root}: the tokenizer makes token {int(windows.max())}, the model has {numbers.vocabulary}; "
            "are the tokenizer's files the ones of this model?"
        )
    return CalibrationText(windows, tuple(path.name for path in text))
