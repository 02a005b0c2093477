"""The tokenizer of a checkpoint as GGUF keys, from tokenizer.model or tokenizer.json (byte-level or byte-fallback BPE).

The keys are those that llama.cpp's converter writes, in its order, so that files of both are read alike. Two things
are better here: the scores of a SentencePiece-like tokenizer.json are its merge ranks (a constant there), and a
tokenizer.model that adds no space before the text says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rondel.converters.errors import RondelError
from rondel.converters.gguf_keys import Tokenizer, TokenType
from rondel.converters.pretokenizer import recognise
from rondel.converters.sentencepiece_model import read_sentencepiece
from rondel.converters.side_files import read_json
from rondel.converters.special_tokens import special_token_keys

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_ADDED_SCORE, _UNUSED_SCORE = -1000.0, -10000.0  # below every merge
_SPACE = "\u2581"  # SentencePiece's visible space

# Tokens that authors forgot to mark as special.
_LOOKS_SPECIAL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL)

# Llama models whose vocabulary size alone says that they never want BOS.
_SIZES_WITHOUT_BOS = (49152,)


@dataclass
class Tokens:
    """The token list of a vocabulary under construction; entries nobody names stay unused."""

    texts: list[str]
    scores: list[float]
    types: list[int]
    merges: list[str] = field(default_factory=list)

    @staticmethod
    def unused(count: int) -> Tokens:
        """`count` tokens that no text produces."""
        return Tokens([f"[PAD{i}]" for i in range(count)], [_UNUSED_SCORE] * count, [TokenType.UNUSED] * count)

    def put(self, token: int, text: str, score: float, kind: int, where: Path) -> None:
        """Name one token; refuses ids beyond the model's vocabulary and text that is not Unicode."""
        if not 0 <= token < len(self.texts):
            raise RondelError(
                f"{where}: token {text!r} has id {token}, config.json's vocab_size is {len(self.texts)}; "
                "the files are of different models"
            )
        if any(0xD800 <= ord(character) < 0xE000 for character in text):
            raise RondelError(f"{where}: token {token} is not valid Unicode")
        self.texts[token], self.scores[token], self.types[token] = text, score, kind


def _added_tokens(tokenizer: dict[str, Any], config: dict[str, Any], where: Path) -> dict[int, tuple[str, bool]]:
    """Text and "is special" of each added token, of tokenizer.json or else tokenizer_config.json."""
    added: dict[int, tuple[str, bool]] = {}
    decoder = config.get("added_tokens_decoder") or {}
    entries: list[tuple[Any, Any]] = list(decoder.items()) if isinstance(decoder, dict) else []
    entries += [(entry.get("id"), entry) for entry in tokenizer.get("added_tokens") or [] if isinstance(entry, dict)]
    for token, entry in entries:
        text = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not str(token).isdecimal():
            raise RondelError(f"{where}: an added token has no text or no id")
        added[int(token)] = (text, bool(entry.get("special")) or _LOOKS_SPECIAL.fullmatch(text) is not None)
    return added


def _put_added(tokens: Tokens, added: dict[int, tuple[str, bool]], where: Path) -> None:
    for token, (text, special) in added.items():
        kind = TokenType.CONTROL if special else TokenType.USER_DEFINED
        tokens.put(token, text if special else text.replace(_SPACE, " "), _ADDED_SCORE, kind, where)


def _vocab(tokenizer: dict[str, Any], where: Path) -> dict[str, int]:
    vocab = tokenizer["model"].get("vocab")
    if not isinstance(vocab, dict) or not all(isinstance(token, int) for token in vocab.values()):
        raise RondelError(f"{where}: has no table of tokens (model.vocab)")
    return vocab


def _merge_pairs(tokenizer: dict[str, Any], where: Path) -> list[tuple[str, str]]:
    pairs = []
    for merge in tokenizer["model"].get("merges") or []:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise RondelError(f"{where}: {merge!r} is not a merge of two tokens")
        pairs.append((pair[0], pair[1]))
    return pairs


def _byte_level(tokenizer: dict[str, Any], config: dict[str, Any], size: int, where: Path) -> Tokens:
    """GPT-2's kind of vocabulary: bytes shown as letters, merges in order."""
    tokens = Tokens.unused(size)
    for text, token in _vocab(tokenizer, where).items():
        tokens.put(token, text, 0.0, TokenType.NORMAL, where)
    _put_added(tokens, _added_tokens(tokenizer, config, where), where)
    pairs = _merge_pairs(tokenizer, where)
    if not pairs:
        raise RondelError(f"{where}: has no merges; only BPE tokenizers can be converted")
    visible = {ord(" "): chr(ord(" ") + 256)}  # a space inside a merge, as byte-level BPE shows it
    tokens.merges = [f"{left.translate(visible)} {right.translate(visible)}" for left, right in pairs]
    return tokens


def _byte_fallback(tokenizer: dict[str, Any], config: dict[str, Any], size: int, where: Path) -> Tokens:
    """SentencePiece's BPE as tokenizer.json: a token's score is the rank of the first merge that makes it."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merge_pairs(tokenizer, where)):
        ranks.setdefault(left + right, rank)
    unknown = tokenizer["model"].get("unk_token")
    tokens = Tokens.unused(size)
    for text, token in _vocab(tokenizer, where).items():
        kind = TokenType.BYTE if _BYTE_TOKEN.fullmatch(text) else TokenType.NORMAL
        tokens.put(token, text, -float(ranks.get(text, len(ranks))), kind, where)
    _put_added(tokens, _added_tokens(tokenizer, config, where), where)
    if isinstance(unknown, str) and unknown in _vocab(tokenizer, where):
        tokens.put(_vocab(tokenizer, where)[unknown], unknown, 0.0, TokenType.UNKNOWN, where)
    return tokens


def _sentencepiece(files: Mapping[str, Path], config: dict[str, Any], size: int) -> tuple[Tokens, bool]:
    """The tokens of tokenizer.model and its added ones, and whether a space is put before the text."""
    where = files["tokenizer.model"]
    model = read_sentencepiece(where)
    if model.unigram:
        raise RondelError(f"{where}: is a unigram model; only SentencePiece models of type BPE can be converted")
    tokens = Tokens.unused(size)
    for token, piece in enumerate(model.pieces):
        # llama.cpp's converter has no use for the user-defined type of a piece.
        kind = TokenType.NORMAL if piece.type == TokenType.USER_DEFINED else piece.type
        tokens.put(token, piece.text, piece.score, kind, where)
    for text, token in read_json(files.get("added_tokens.json")).items():
        if not isinstance(token, int):
            raise RondelError(f"{files['added_tokens.json']}: token {text!r} has no number")
        if token < size:
            tokens.put(token, text, _ADDED_SCORE, TokenType.USER_DEFINED, files["added_tokens.json"])
    # Many fine-tunes name a padding token that the model has no embedding for: left out, as by llama.cpp.
    added = {token: named for token, named in _added_tokens({}, config, where).items() if token < size}
    _put_added(tokens, added, where)
    return tokens, model.add_dummy_prefix


def vocabulary_keys(files: Mapping[str, Path], size: int, *, family: str, pre: str | None = None) -> dict[str, Any]:
    """The tokenizer's GGUF keys from a checkpoint's side files (by name), for a model of `size` tokens.

    `family` is GGUF's architecture; `pre` overrides the recognised pre-tokenizer. What cannot be converted exactly is
    refused.
    """
    config = read_json(files.get("tokenizer_config.json"))
    tokenizer = read_json(files.get("tokenizer.json"))
    keys: dict[str, Any] = {}
    if family == "llama" and isinstance(config.get("add_prefix_space"), bool):
        keys[Tokenizer.ADD_SPACE_PREFIX] = config["add_prefix_space"]
    if "tokenizer.model" in files:
        tokens, prefix = _sentencepiece(files, config, size)
        if not prefix:
            keys.setdefault(Tokenizer.ADD_SPACE_PREFIX, False)
        keys |= {Tokenizer.MODEL: "llama", Tokenizer.PRE: pre or "default"}
    elif tokenizer:
        where = files["tokenizer.json"]
        if not isinstance(tokenizer.get("model"), dict) or tokenizer["model"].get("type", "BPE") != "BPE":
            raise RondelError(f"{where}: only BPE tokenizers can be converted")
        if tokenizer["model"].get("byte_fallback"):
            tokens = _byte_fallback(tokenizer, config, size, where)
            keys |= {Tokenizer.MODEL: "llama", Tokenizer.PRE: pre or "default"}
        else:
            keys |= {Tokenizer.MODEL: "gpt2", Tokenizer.PRE: pre or recognise(tokenizer, str(where))}
            tokens = _byte_level(tokenizer, config, size, where)
    else:
        raise RondelError(
            "the model has no tokenizer: expected tokenizer.json or tokenizer.model beside its config.json"
        )
    keys[Tokenizer.TOKENS] = tokens.texts
    if keys[Tokenizer.MODEL] == "llama":
        keys[Tokenizer.SCORES] = tokens.scores
    keys[Tokenizer.TOKEN_TYPE] = tokens.types
    if tokens.merges:
        keys[Tokenizer.MERGES] = tokens.merges
    keys |= special_token_keys(files, tokenizer, config, size)
    if family == "llama" and size in _SIZES_WITHOUT_BOS:
        keys[Tokenizer.ADD_BOS] = False
    return keys
