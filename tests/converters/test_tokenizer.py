"""Token ids equal llama.cpp's on its own vectors, and text survives the way there and back."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rondel.converters.errors import RondelError
from rondel.converters.tokenizer import StreamDecoder, Tokenizer
from rondel.converters.word_split import WORD_SPLITS

VOCABULARIES = Path(__file__).parents[2].parent / "shared" / "vocab"
NAMES = ["llama-spm", "llama-bpe", "qwen2", "deepseek-llm"]
SEPARATOR = "\n__ggml_vocab_test__\n"
SCALARS = {4: "I", 5: "i", 6: "f", 7: "?", 10: "Q"}  # the GGUF value types these vocabulary files use


def read_keys(data: bytes) -> dict[str, Any]:
    """A GGUF's keys. The gguf package takes ten seconds for 280,000 strings, these lines take one."""
    at = 24
    count = struct.unpack_from("<Q", data, 16)[0]

    def text() -> str:
        nonlocal at
        length = struct.unpack_from("<Q", data, at)[0]
        at += 8 + length
        return data[at - length : at].decode()

    def value(kind: int) -> Any:
        nonlocal at
        if kind == 8:
            return text()
        if kind == 9:
            element, length = struct.unpack_from("<IQ", data, at)
            at += 12
            return [value(element) for _ in range(length)]
        found = struct.unpack_from("<" + SCALARS[kind], data, at)[0]
        at += struct.calcsize("<" + SCALARS[kind])
        return found

    keys = {}
    for _ in range(count):
        name = text()
        at += 4
        keys[name] = value(struct.unpack_from("<I", data, at - 4)[0])
    return keys


@cache
def tokenizer_of(name: str) -> Tokenizer:
    path = VOCABULARIES / f"ggml-vocab-{name}.gguf"
    if not path.exists():
        pytest.skip(f"needs llama.cpp's vocabulary {path.name} in ../shared/vocab")
    return Tokenizer(read_keys(path.read_bytes()))


def vectors(name: str) -> list[tuple[str, list[int]]]:
    texts = (VOCABULARIES / f"ggml-vocab-{name}.gguf.inp").read_bytes().decode().split(SEPARATOR)
    lines = (VOCABULARIES / f"ggml-vocab-{name}.gguf.out").read_text().splitlines()
    return list(zip(texts, [[int(number) for number in line.split()] for line in lines], strict=False))


@pytest.mark.parametrize("name", NAMES)
def test_ids_equal_llama_cpps_vectors(name: str) -> None:
    tokenizer = tokenizer_of(name)
    cases = vectors(name)
    assert len(cases) > 40
    for text, expected in cases:
        assert tokenizer.encode(text, add_special=False) == expected, repr(text)
        assert tokenizer.decode(expected) == text


# What llama.cpp makes of marks, combining characters and spaces outside ASCII, recorded from its library.
RECORDED = {
    ("deepseek-llm", "\u00a0\u00a0\u3000x"): [100000, 10467, 88946, 87],
    ("deepseek-llm", "a \u2028\u3000\u0085b"): [100000, 64, 207, 350, 101, 88946, 124, 214, 65],
    ("llama-spm", "a \u2028\u3000\u0085b"): [1, 263, 29871, 31353, 30358, 197, 136, 29890],
    ("llama-spm", "<|im_end|></s> x"): [1, 529, 29989, 326, 29918, 355, 29989, 29958, 2, 29871, 921],
    ("llama-bpe", "a \u2028\u3000\u0085b"): [128000, 64, 639, 101, 23249, 116360, 65],
    ("llama-bpe", "<|im_end|></s> x"): [128000, 27, 91, 318, 6345, 91, 1500, 82, 29, 865],
    ("qwen2", "a \u2028\u3000\u0085b"): [64, 636, 101, 22441, 126, 227, 65],
    ("qwen2", "<|im_end|></s> x"): [151645, 128247, 856],
}


@pytest.mark.parametrize(("name", "text"), sorted(RECORDED))
def test_ids_equal_recorded_ones(name: str, text: str) -> None:
    assert tokenizer_of(name).encode(text, parse_special=True) == RECORDED[name, text]


@pytest.mark.parametrize("name", ["llama-spm", "llama-bpe"])
def test_stream_equals_whole_text_and_never_shows_half_a_character(name: str) -> None:
    tokenizer = tokenizer_of(name)
    text = "日本 \N{GRINNING FACE}\N{RICE BALL} naïve ひら"
    stream = StreamDecoder(tokenizer)
    ids = tokenizer.encode(text)
    pieces = [stream.feed(token) for token in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "" in pieces[1:]  # some character takes several tokens here
    assert "".join([*pieces, stream.finish()]).removeprefix(" ") == text


# ---- a vocabulary of our own: runs everywhere ----


def bpe_keys(**changes: Any) -> dict[str, Any]:
    tokens = ["a", "b", "c", "Ġ", "!", "Ã", "©", "ab", "abc", "Ġa", "<|start|>", "<|im_end|>", "[user]", "1"]
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 10 + [3, 3, 4, 1],
        "tokenizer.ggml.merges": ["a b", "ab c", "Ġ a"],
        "tokenizer.ggml.bos_token_id": 10,
        "tokenizer.ggml.eos_token_id": 11,
    }
    return keys | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


def spm_keys(**changes: Any) -> dict[str, Any]:
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", "a", "b", "ab", "ba", "▁a", "aa"]
    scores = [0.0, -1.0, -2.0, -3.0, -3.0, -9.0, -4.0]
    keys = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *bytes_, *words],
        "tokenizer.ggml.scores": [0.0] * 259 + scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
    }
    return keys | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}


WORD = 259  # the first id of `words` above


def test_bpe_merges_and_splits() -> None:
    tokenizer = Tokenizer(bpe_keys())
    assert tokenizer.encode("abc abb!") == [8, 3, 7, 1, 4]  # "a b" stands before "Ġ a"
    assert tokenizer.encode("a a") == [0, 9]
    assert tokenizer.bytes_of(9) == b" a"
    assert tokenizer.decode([5, 6]) == "é"


def test_words_that_are_tokens_stay_whole_where_the_kind_says_so() -> None:
    keys = bpe_keys(merges=["b c", "a b"])
    keys["tokenizer.ggml.tokens"] = [*keys["tokenizer.ggml.tokens"], "bc"]
    keys["tokenizer.ggml.token_type"] = [*keys["tokenizer.ggml.token_type"], 1]
    assert Tokenizer(keys).encode("abc") == [0, 14]
    assert Tokenizer(keys | {"tokenizer.ggml.pre": "llama-bpe"}).encode("abc", add_special=False) == [8]


def test_special_tokens() -> None:
    tokenizer = Tokenizer(bpe_keys(add_bos_token=True, add_eos_token=True))
    assert tokenizer.encode("a") == [10, 0, 11]
    assert tokenizer.encode("a[user]b", add_special=False) == [0, 12, 1]  # user-defined: always one token
    assert tokenizer.encode("<|start|>a", add_special=False, parse_special=True) == [10, 0]
    assert 10 not in tokenizer.encode("<|start|>a", add_special=False)
    assert tokenizer.decode([10, 0, 11]) == "a"
    assert tokenizer.decode([10, 0, 11], special=True) == "<|start|>a<|im_end|>"
    assert tokenizer.is_end(11)
    assert not tokenizer.is_end(10)


def test_a_known_end_of_turn_ends_whatever_the_file_says() -> None:
    tokenizer = Tokenizer(bpe_keys(eos_token_id=10, token_type=[1] * 14))
    assert tokenizer.is_end(11)
    assert tokenizer.is_special(11)


def test_equal_scores_join_from_the_left() -> None:
    # "aba": ab and ba score the same, so the left one wins; a list of ranked merges would always prefer one of them.
    tokenizer = Tokenizer(spm_keys(add_space_prefix=False))
    assert tokenizer.encode("aba", add_special=False) == [WORD + 3, WORD + 1]
    assert tokenizer.encode("bab", add_special=False) == [WORD + 4, WORD + 2]


def test_space_prefix_and_byte_fallback() -> None:
    tokenizer = Tokenizer(spm_keys())
    assert tokenizer.encode("a") == [1, WORD + 5]
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("é", add_special=False) == [WORD, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(tokenizer.encode("é a")) == "é a"
    # After a special token the prefix comes again, as at the beginning.
    assert tokenizer.encode("a</s>a", add_special=False, parse_special=True) == [WORD + 5, 2, WORD + 5]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab cé", max_size=12))
def test_cutting_between_strangers_changes_nothing(text: str) -> None:
    """The cache works on pieces; without it the whole text is merged at once. Both give the same ids."""
    tokenizer = Tokenizer(spm_keys())
    written = text.replace(" ", "▁")
    assert tokenizer._spm.encode(written) == tokenizer._spm._merge(written)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=20))
def test_every_text_comes_back(text: str) -> None:
    tokenizer = Tokenizer(spm_keys())
    stream = StreamDecoder(tokenizer)
    shown = "".join(stream.feed(token) for token in tokenizer.encode(text)) + stream.finish()
    assert shown.removeprefix(" ") == text.replace("▁", " ").removeprefix(" " * text.startswith("▁"))


@pytest.mark.parametrize("name", sorted(WORD_SPLITS))
def test_every_known_cut_compiles_and_loses_nothing(name: str) -> None:
    tokenizer = Tokenizer(bpe_keys(pre=name, add_bos_token=False))
    assert tokenizer.decode(tokenizer.encode("ab abc!a 11 é")) == "ab abc!a 11 é"


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (lambda: {}, "tokenizer.ggml.model: the file has no such key"),
        (lambda: bpe_keys(model="bert"), "'bert', expected 'gpt2' or 'llama'"),
        (lambda: bpe_keys(pre="nobody"), "'nobody' is a way to cut words that rondel does not know"),
        (lambda: bpe_keys(tokens=[]), "tokenizer.ggml.tokens: expected one text or more"),
        (lambda: bpe_keys(token_type=[1]), "tokenizer.ggml.token_type: 1 values for 14 tokens"),
        (lambda: bpe_keys(token_type=["1"] * 14), "tokenizer.ggml.token_type: expected one number a token"),
        (lambda: bpe_keys(merges=[1]), "tokenizer.ggml.merges: expected texts"),
        (lambda: bpe_keys(merges=["ab"]), "tokenizer.ggml.merges: 'ab', expected two texts"),
        (lambda: bpe_keys(merges=["x y"]), "tokenizer.ggml.merges do not fit the tokens"),
    ],
)
def test_bad_keys_are_one_sentence(keys: Callable[[], dict[str, Any]], sentence: str) -> None:
    with pytest.raises(RondelError) as caught:
        Tokenizer(keys()).encode("ab")
    assert sentence in str(caught.value)
