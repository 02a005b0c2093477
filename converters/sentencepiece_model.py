"""Reads SentencePiece's tokenizer.model: a protobuf message, walked by hand so that no extra package is needed."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rondel.converters.errors import RondelError

MAX_BYTES = 1 << 28  # the largest known vocabularies are below 10 MB
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # protobuf's wire types
UNIGRAM = 1  # TrainerSpec.model_type

# Field numbers of SentencePiece's published message ModelProto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_TRAINER_MODEL_TYPE = 3
_NORMALIZER_DUMMY_PREFIX = 3


@dataclass(frozen=True)
class Piece:
    """One token: its text, the score that orders merges, and its type (as tokenizer.ggml.token_type counts them)."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SentencePieceModel:
    """The parts of tokenizer.model that a GGUF file keeps."""

    pieces: list[Piece]
    unigram: bool
    add_dummy_prefix: bool  # a space is put before the text


class _Malformed(ValueError):
    """The bytes are no protobuf message."""


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise _Malformed("ends inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, at
    raise _Malformed("a number has more than ten bytes")


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field number and value of each field: an integer, or the bytes of the three other wire types."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == BYTES:
            length, at = _varint(data, at)
        elif wire in (FIXED32, FIXED64):
            length = 4 if wire == FIXED32 else 8
        else:
            raise _Malformed(f"wire type {wire}")
        if length > len(data) - at:
            raise _Malformed(f"a field of {length} bytes where {len(data) - at} are left")
        yield number, data[at : at + length]
        at += length


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise _Malformed("a number where bytes belong")
    return value


def _integer(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise _Malformed("bytes where a number belongs")
    return value


def _piece(data: memoryview) -> Piece:
    text, score, kind = "", 0.0, 1
    for number, value in _fields(data):
        if number == _PIECE_TEXT:
            text = str(_bytes(value), "utf-8")
        elif number == _PIECE_SCORE:
            if len(_bytes(value)) != 4:
                raise _Malformed("a score that is no 32-bit float")
            score = struct.unpack("<f", _bytes(value))[0]
        elif number == _PIECE_TYPE:
            kind = _integer(value)
    if not 1 <= kind <= 6:
        raise _Malformed(f"a token of type {kind}")
    return Piece(text, score, kind)


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """The tokens of a tokenizer.model."""
    pieces: list[Piece] = []
    unigram, dummy_prefix = False, True
    try:
        if path.stat().st_size > MAX_BYTES:
            raise _Malformed(f"larger than {MAX_BYTES} bytes")
        for number, value in _fields(memoryview(path.read_bytes())):
            if number == _PIECES:
                pieces.append(_piece(_bytes(value)))
            elif number == _TRAINER:
                kinds = [_integer(v) for n, v in _fields(_bytes(value)) if n == _TRAINER_MODEL_TYPE]
                unigram = kinds[-1:] == [UNIGRAM]
            elif number == _NORMALIZER:
                flags = [_integer(v) for n, v in _fields(_bytes(value)) if n == _NORMALIZER_DUMMY_PREFIX]
                dummy_prefix = bool(flags[-1]) if flags else True
    except (OSError, ValueError) as error:
        raise RondelError(f"{path}: cannot be read as a SentencePiece model ({error}); download it again") from error
    if not pieces:
        raise RondelError(f"{path}: holds no tokens; download it again")
    return SentencePieceModel(pieces, unigram, dummy_prefix)
