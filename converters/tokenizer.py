"""Text to token ids and back, rebuilt from the `tokenizer.*` keys of a GGUF file, id for id as llama.cpp does it.

Byte-level BPE runs in the `tokenizers` library; SentencePiece vocabularies run in `rondel.converters.bigrams`.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Mapping
from functools import cache, cached_property
from typing import Any

from rondel.converters.bigrams import BigramModel
from rondel.converters.errors import RondelError
from rondel.converters.word_split import WordSplit, word_split

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"  # how SentencePiece writes a space

# fmt: off
# Tokens that end an answer in the models that have them, whatever type the file gives them.
ENDS = frozenset(
    [
        "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
        "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>",
        "<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "[e~[", "<｜end▁of▁sentence｜>",
    ]
)
# Marks of fill-in-the-middle prompts. They are control tokens, and the second group ends an answer too.
_MIDDLES = frozenset(
    [
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
        "<|prefix|>", "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
        "<|code_suffix|>", "<|suffix|>", "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>",
        "▁<MID>", "<|code_middle|>", "<|middle|>",
    ]
)
_MIDDLE_ENDS = frozenset(
    [
        "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>",
        "<REPO>", "<reponame>", "<|file_sep|>",
    ]
)
# fmt: on
_END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")


class Tokenizer:
    """The vocabulary of one model. `keys`: a GGUF's keys, of which those under `tokenizer.` are read."""

    def __init__(self, keys: Mapping[str, Any]) -> None:
        self.model = str(_required(keys, "tokenizer.ggml.model"))
        if self.model not in ("gpt2", "llama"):
            raise RondelError(
                f"tokenizer.ggml.model: {self.model!r}, expected 'gpt2' or 'llama': rondel knows no other"
            )
        tokens = list(_required(keys, "tokenizer.ggml.tokens"))
        if not tokens or not all(isinstance(token, str) for token in tokens):
            raise RondelError("tokenizer.ggml.tokens: expected one text or more, got none or something else")
        self.tokens: list[str] = [text or f"[EMPTY_{index}]" for index, text in enumerate(tokens)]
        self.ids = {text: index for index, text in enumerate(self.tokens)}
        self._pre: WordSplit | None = None
        if self.model == "gpt2":
            self._pre = word_split(str(keys.get("tokenizer.ggml.pre", "") or "default"))
        else:
            self._scores = self._per_token(keys, "scores", 0.0)
        self._merges: list[str] = list(keys.get("tokenizer.ggml.merges", ()))
        if not all(isinstance(merge, str) for merge in self._merges):
            raise RondelError("tokenizer.ggml.merges: expected texts, got something else")
        self._types = [int(kind) for kind in self._per_token(keys, "token_type", NORMAL)]
        spm = self.model == "llama"
        self.bos = self._special(keys, "bos", 1 if spm else None)
        self.eos = self._special(keys, "eos", 2 if spm else None)
        self.unknown = self._special(keys, "unknown", 0 if spm else None)
        self.add_bos = bool(
            keys.get("tokenizer.ggml.add_bos_token", spm or (self._pre is not None and self._pre.add_bos))
        )
        self.add_eos = bool(keys.get("tokenizer.ggml.add_eos_token", False))
        self.add_space_prefix = bool(keys.get("tokenizer.ggml.add_space_prefix", spm))
        template = keys.get("tokenizer.chat_template")
        self.chat_template: str | None = template if isinstance(template, str) else None
        self._mark_ends(keys)

    def _per_token(self, keys: Mapping[str, Any], name: str, default: Any) -> list[Any]:
        values = keys.get(f"tokenizer.ggml.{name}")
        if values is None:
            return [default] * len(self.tokens)
        values = values.tolist() if hasattr(values, "tolist") else values  # a numpy array, or a list
        if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
            raise RondelError(f"tokenizer.ggml.{name}: expected one number a token, got something else")
        if len(values) < len(self.tokens):
            raise RondelError(f"tokenizer.ggml.{name}: {len(values)} values for {len(self.tokens)} tokens")
        return values[: len(self.tokens)]

    def _special(self, keys: Mapping[str, Any], name: str, default: int | None) -> int | None:
        value = keys.get(f"tokenizer.ggml.{name}_token_id", default)
        return value if isinstance(value, int) and 0 <= value < len(self.tokens) else None

    def _mark_ends(self, keys: Mapping[str, Any]) -> None:
        named = (self._special(keys, name, None) for name in _END_KEYS)
        self._ends = {index for index in (*named, self.eos) if index is not None}
        for text in ENDS | _MIDDLES | _MIDDLE_ENDS:
            index = self.ids.get(text)
            if index is not None:
                self._types[index] = CONTROL
                if text not in _MIDDLES:
                    self._ends.add(index)

    @property
    def vocabulary_size(self) -> int:
        """How many tokens there are."""
        return len(self.tokens)

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer: end of text, of turn or of message."""
        return token in self._ends

    @property
    def ends(self) -> list[int]:
        """The tokens for which `is_end` holds."""
        return sorted(self._ends)

    def is_special(self, token: int) -> bool:
        """Whether the token is a mark (begin, end, role, unknown) and no text."""
        return self._types[token] in (CONTROL, UNKNOWN)

    # ---- text to ids ----

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The ids of `text`; begin and end tokens where the model wants them, control tokens read only on request."""
        # A command line that is no UTF-8 reaches us as lone surrogates.
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        ids = [self.bos] if add_special and self.add_bos and self.bos is not None else []
        after_special = True
        for part in self._partition(text, parse_special):
            if isinstance(part, int):
                ids.append(part)
            elif self.model == "gpt2":
                ids += self._bpe.encode(part, add_special_tokens=False).ids
            else:
                prefix = " " if self.add_space_prefix and after_special else ""
                ids += self._spm.encode((prefix + part).replace(" ", SPACE))
            after_special = isinstance(part, int)
        if add_special and self.add_eos and self.eos is not None:
            ids.append(self.eos)
        return ids

    @cached_property
    def _specials(self) -> list[int]:
        kept = (i for i, kind in enumerate(self._types) if kind in (CONTROL, USER_DEFINED, UNKNOWN))
        return sorted(kept, key=lambda index: -len(_bytes(self.tokens[index])))

    def _partition(self, text: str, parse_special: bool) -> list[str | int]:
        """Cut at whole special tokens, the longest of the vocabulary first; user-defined ones always."""
        parts: list[str | int] = [text] if text else []
        for index in self._specials:
            if not parse_special and self._types[index] != USER_DEFINED:
                continue
            mark = self.tokens[index]
            if mark in text:
                parts = [
                    piece for part in parts for piece in (_cut(part, mark, index) if isinstance(part, str) else [part])
                ]
        return parts

    @cached_property
    def _bpe(self) -> Any:
        from tokenizers import Regex, models, pre_tokenizers
        from tokenizers import Tokenizer as Engine

        assert self._pre is not None
        pairs = []
        for merge in self._merges:
            space = merge.find(" ", 1)  # a token may begin with the space itself
            if space < 0:
                raise RondelError(f"tokenizer.ggml.merges: {merge!r}, expected two texts and a space between them")
            pairs.append((merge[:space], merge[space + 1 :]))
        try:
            engine = Engine(models.BPE(vocab=self.ids, merges=pairs, ignore_merges=self._pre.whole_words))
        except Exception as error:  # the library raises bare Exception
            raise RondelError(f"tokenizer.ggml.merges do not fit the tokens: {error}") from error
        cuts = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in self._pre.expressions]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        engine.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
        return engine

    @cached_property
    def _spm(self) -> BigramModel:
        return BigramModel(self.ids, self._scores, self._byte_ids)

    def _byte_ids(self, character: str) -> list[int]:
        ids = []
        for byte in character.encode():
            index = self.ids.get(f"<0x{byte:02X}>", self.ids.get(chr(byte), self.unknown))
            if index is None:
                raise RondelError(
                    f"{character!r}: the vocabulary has no token for it, none for its bytes, and no unknown token"
                )
            ids.append(index)
        return ids

    # ---- ids to text ----

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token adds to the text; for a mark, its name."""
        text, kind = self.tokens[token], self._types[token]
        if kind in (CONTROL, UNKNOWN, USER_DEFINED):
            return _bytes(text)
        if kind == BYTE:
            return bytes([_byte_value(text)])
        if kind != NORMAL:
            return b""
        if self.model == "llama":
            return _bytes(text.replace(SPACE, " "))
        table = _byte_of_character()
        return b"".join(bytes([table[c]]) if c in table else _bytes(c) for c in text)

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of `ids`, without the space that encoding puts first; with `special`, marks by their names."""
        pieces, first = [], self.add_space_prefix
        for token in ids:
            if not self.is_special(token):
                piece = self.bytes_of(token)
                pieces.append(piece.removeprefix(b" ") if first else piece)
                first = False
            elif special:
                pieces.append(self.bytes_of(token))
        return b"".join(pieces).decode("utf-8", "replace")


class StreamDecoder:
    """Text token by token: a character is held back until its last byte has come."""

    def __init__(self, tokenizer: Tokenizer, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """What the token completes; may be empty."""
        if self._tokenizer.is_special(token) and not self._special:
            return ""
        return self._decoder.decode(self._tokenizer.bytes_of(token))

    def finish(self) -> str:
        """What is left: a replacement character where the last one never became whole."""
        return self._decoder.decode(b"", True)


def _required(keys: Mapping[str, Any], name: str) -> Any:
    if keys.get(name) is None:
        raise RondelError(f"{name}: the file has no such key, so it holds no vocabulary; use a GGUF made with one")
    return keys[name]


def _bytes(text: str) -> bytes:
    """UTF-8; tokens that were other bytes in the file are those again."""
    return text.encode("utf-8", "surrogateescape")


def _cut(text: str, mark: str, index: int) -> list[str | int]:
    parts: list[str | int] = []
    for number, piece in enumerate(text.split(mark)):
        parts += [index] * (number > 0)
        parts += [piece] * bool(piece)
    return parts


def _byte_value(text: str) -> int:
    """The byte of a token like "<0x0A>"."""
    try:
        value = int(text[3:5], 16)
    except ValueError:
        value = -1
    if len(text) != 6 or not text.startswith("<0x") or value < 0:
        raise RondelError(f"tokenizer.ggml.tokens: byte token {text!r}, expected a text like <0x0A>")
    return value


@cache
def _byte_of_character() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary, as GPT-2 chose them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shown = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in printable]
    return shown | {chr(256 + number): byte for number, byte in enumerate(hidden)}
