"""Tokenizer files to GGUF keys, against what llama.cpp's converter wrote for the same models."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from rondel.converters.errors import RondelError
from rondel.converters.gguf_keys import Tokenizer as Keys
from rondel.converters.gguf_keys import TokenType
from rondel.converters.sentencepiece_model import read_sentencepiece
from rondel.converters.tokenizer import Tokenizer as Encoder
from rondel.converters.vocabulary import vocabulary_keys

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "tests/models/stories-4m"
STORIES = ROOT / "tests/models/stories.txt"
SHARED = ROOT.parent / "shared/models"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What llama.cpp's converter wrote for these models (its pre-tokenizer forced to "qwen2" for the two it has no hash of):
# every key but the lists, and a hash of each list.
RECORDED: dict[str, dict[str, Any]] = {
    "stories-4m": {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": "e4b7b8e6be206680",
        "tokenizer.ggml.token_type": "02bb60d42ddaf9f4",
        "tokenizer.ggml.merges": "168a9d4fd07ebcd7",
        "tokenizer.ggml.eos_token_id": 2045,
        "tokenizer.ggml.padding_token_id": 2045,
    },
    "prose-7m": {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": "3ca2a5b80ae82d3d",
        "tokenizer.ggml.token_type": "9f244410531833da",
        "tokenizer.ggml.merges": "f708bd51402ce85d",
        "tokenizer.ggml.eos_token_id": 4093,
        "tokenizer.ggml.padding_token_id": 4093,
    },
    "stories260K": {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": "eb14a5c1698ca1b3",
        "tokenizer.ggml.scores": "cb284af430f0c61a",
        "tokenizer.ggml.token_type": "057f61fd7850952a",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    },
    "babyllama-tok105": {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": "a4ed58d758c417fe",
        "tokenizer.ggml.scores": "e7b582fd34384ab0",
        "tokenizer.ggml.token_type": "5860bdd17ebf6e5a",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    },
}


def files_of(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.iterdir() if path.is_file()}


def digest(value: Any) -> Any:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16] if isinstance(value, list) else value


@pytest.mark.parametrize(
    ("model", "size", "family"),
    [
        ("stories-4m", 2048, "qwen3"),
        ("prose-7m", 4096, "qwen3"),
        ("stories260K", 512, "llama"),
        ("babyllama-tok105", 105, "llama"),
    ],
)
def test_keys_are_those_of_llama_cpps_converter(model: str, size: int, family: str) -> None:
    folder = DEMO if model == "stories-4m" else SHARED / model
    if not folder.is_dir():
        pytest.skip(f"{model} is not on this machine")
    keys = vocabulary_keys(files_of(folder), size, family=family)
    assert {key: digest(value) for key, value in keys.items()} == RECORDED[model]


Write = Callable[..., dict[str, Path]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a small byte-level tokenizer: `pre` its pre-tokenizer, `config` tokenizer_config.json, `change` edits."""

    def make(
        pre: Any = None,
        config: dict[str, Any] | None = None,
        model_config: dict[str, Any] | None = None,
        change: Callable[[dict[str, Any]], Any] = lambda content: None,
        **model: Any,
    ) -> dict[str, Path]:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocab = {token: index for index, token in enumerate([*alphabet, "th", "the"])}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h"), ("th", "e")], **model))
        tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.add_special_tokens(["<s>", "</s>"])
        tokenizer.add_tokens(["\u2581extra"])
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        change(content)
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "config.json").write_text(json.dumps(model_config or {}))
        return files_of(tmp_path)

    return make


def split(pattern: str) -> Any:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def test_tokens_types_and_padding(write: Write) -> None:
    keys = vocabulary_keys(write(), 264, family="qwen2")
    assert keys[Keys.MODEL] == "gpt2"
    assert keys[Keys.TOKENS][256:] == ["th", "the", "<s>", "</s>", " extra", "[PAD261]", "[PAD262]", "[PAD263]"]
    assert keys[Keys.TOKEN_TYPE][256:] == [
        *[TokenType.NORMAL] * 2,
        *[TokenType.CONTROL] * 2,
        TokenType.USER_DEFINED,
        *[TokenType.UNUSED] * 3,
    ]
    assert keys[Keys.MERGES] == ["t h", "th e"]
    assert Keys.SCORES not in keys


@pytest.mark.parametrize(
    ("pre", "ignore_merges", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), False, "gpt-2"),
        (split(LLAMA3), True, "llama-bpe"),
        (split(LLAMA3.replace("{1,3}", "")), False, "qwen2"),
        (
            pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
            False,
            "smollm",
        ),
    ],
)
def test_known_pre_tokenizers_are_recognised(write: Write, pre: Any, ignore_merges: bool, name: str) -> None:
    assert vocabulary_keys(write(pre, ignore_merges=ignore_merges), 261, family="llama")[Keys.PRE] == name


def test_an_unknown_pre_tokenizer_is_refused_and_can_be_named(write: Write) -> None:
    files = write(split(r"\p{L}+|\P{L}+"))
    with pytest.raises(RondelError, match="--pre"):
        vocabulary_keys(files, 261, family="llama")
    assert vocabulary_keys(files, 261, family="llama", pre="olmo")[Keys.PRE] == "olmo"


def test_special_tokens_come_from_the_tokenizers_config_then_from_the_models(write: Write) -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True}
    keys = vocabulary_keys(
        write(config=config, model_config={"eos_token_id": 7, "pad_token_id": 5}), 261, family="llama"
    )
    assert (keys[Keys.BOS], keys[Keys.EOS], keys[Keys.PADDING]) == (258, 259, 5)
    assert keys[Keys.ADD_BOS] is True
    assert Keys.ADD_EOS not in keys


def test_the_post_processor_decides_whether_bos_is_added(write: Write) -> None:
    def add_bos(content: dict[str, Any]) -> None:
        bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
        first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
        template = {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, bos, second],
            "special_tokens": {},
        }
        content["post_processor"] = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}

    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}
    keys = vocabulary_keys(write(config=config, change=add_bos), 261, family="llama")
    assert (keys[Keys.ADD_BOS], keys[Keys.ADD_EOS], keys[Keys.ADD_SEP]) == (True, False, False)


def test_chat_templates(write: Write, tmp_path: Path) -> None:
    config = {"chat_template": [{"name": "default", "template": "a"}, {"name": "tool use", "template": "b"}]}
    keys = vocabulary_keys(write(config=config), 261, family="llama")
    assert keys[Keys.CHAT_TEMPLATE] == "a"
    assert keys["tokenizer.chat_template.tool_use"] == "b"
    assert keys[Keys.CHAT_TEMPLATES] == ["tool_use"]
    (tmp_path / "chat_template.jinja").write_text("c")
    assert vocabulary_keys(write(config={}), 261, family="llama")[Keys.CHAT_TEMPLATE] == "c"


def test_a_byte_fallback_tokenizer_becomes_sentencepiece_with_merge_ranks(tmp_path: Path) -> None:
    words = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "\u2581", "t", "h", "\u2581t", "th"]
    merges = [("\u2581", "t"), ("t", "h")]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    keys = vocabulary_keys(files_of(tmp_path), len(words), family="llama")
    assert (keys[Keys.MODEL], keys[Keys.PRE]) == ("llama", "default")
    assert keys[Keys.SCORES][-2:] == [0.0, -1.0]
    assert keys[Keys.TOKEN_TYPE][:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]


def test_both_forms_of_one_tokenizer_cut_texts_alike(tmp_path: Path) -> None:
    """A tokenizer.json made from a tokenizer.model, as exporters make it: both and the library give the same ids."""
    folder = SHARED / "stories260K"
    if not folder.is_dir():
        pytest.skip("stories260K is not on this machine")
    pieces = read_sentencepiece(folder / "tokenizer.model").pieces
    vocab = {piece.text: token for token, piece in enumerate(pieces)}
    merges = [
        (-piece.score, vocab[piece.text[:cut]], vocab[piece.text[cut:]], piece.text[:cut], piece.text[cut:])
        for piece in pieces
        for cut in range(1, len(piece.text))
        if piece.type == TokenType.NORMAL and piece.text[:cut] in vocab and piece.text[cut:] in vocab
    ]
    ordered = [merge[3:] for merge in sorted(merges)]
    library = Tokenizer(models.BPE(vocab=vocab, merges=ordered, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    text = STORIES.read_text(encoding="utf-8")[:5000] + " caf\u00e9 \u2603"
    expected = library.encode(text).ids
    for files in (files_of(tmp_path), files_of(folder)):
        assert Encoder(vocabulary_keys(files, 512, family="llama")).encode(text)[1:] == expected


def test_tokens_beyond_the_models_vocabulary_are_refused(write: Write) -> None:
    with pytest.raises(RondelError, match="vocab_size is 260"):
        vocabulary_keys(write(), 260, family="llama")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"model": 3}', '{"model": {"type": "Unigram"}}', '{"model": {"vocab": 1}}']
)
def test_damaged_tokenizers_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(RondelError):
        vocabulary_keys(files_of(tmp_path), 10, family="llama", pre="gpt-2")


def test_a_model_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(RondelError, match=r"tokenizer\.model"):
        vocabulary_keys({}, 10, family="llama")


def _field(number: int, data: bytes) -> bytes:
    return bytes([number << 3 | 2, len(data)]) + data


def sentencepiece(*pieces: tuple[str, float, int], kind: int = 2, prefix: bool = True) -> bytes:
    """A tokenizer.model as the library writes it: pieces, trainer_spec.model_type, normalizer_spec.add_dummy_prefix."""
    packed = b"".join(
        _field(1, _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + bytes([0x18, sort]))
        for text, score, sort in pieces
    )
    return packed + _field(2, bytes([0x18, kind])) + _field(3, bytes([0x18, prefix]))


def test_sentencepiece_models_match_the_library() -> None:
    library = pytest.importorskip("sentencepiece")
    path = SHARED / "stories260K/tokenizer.model"
    if not path.is_file():
        pytest.skip("stories260K is not on this machine")
    reference = library.SentencePieceProcessor(model_file=str(path))
    model = read_sentencepiece(path)
    assert [piece.text for piece in model.pieces] == [reference.IdToPiece(i) for i in range(reference.vocab_size())]
    assert [piece.score for piece in model.pieces] == [reference.GetScore(i) for i in range(reference.vocab_size())]


def test_a_sentencepiece_model_without_the_first_space_says_so(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece(("<unk>", 0.0, 2), ("a", -1.0, 1), prefix=False))
    keys = vocabulary_keys(files_of(tmp_path), 3, family="llama")
    assert keys[Keys.ADD_SPACE_PREFIX] is False
    assert keys[Keys.TOKENS] == ["<unk>", "a", "[PAD2]"]
    assert keys[Keys.SCORES] == [0.0, -1.0, -10000.0]


def test_added_tokens_that_the_model_has_no_embedding_for_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece(("<unk>", 0.0, 2), ("a", -1.0, 1)))
    (tmp_path / "added_tokens.json").write_text('{"<mark>": 2, "[PAD]": 3}')
    decoder = {"2": {"content": "<mark>", "special": True}, "3": {"content": "[PAD]", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    keys = vocabulary_keys(files_of(tmp_path), 3, family="llama")
    assert keys[Keys.TOKENS] == ["<unk>", "a", "<mark>"]
    assert keys[Keys.TOKEN_TYPE] == [TokenType.UNKNOWN, TokenType.NORMAL, TokenType.CONTROL]


def test_unigram_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece(("<unk>", 0.0, 2), kind=1))
    with pytest.raises(RondelError, match="unigram"):
        vocabulary_keys(files_of(tmp_path), 3, family="llama")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 60), value=st.integers(0, 255), cut=st.integers(0, 60))
def test_damaged_sentencepiece_models_are_refused_or_read(tmp_path: Path, at: int, value: int, cut: int) -> None:
    data = bytearray(sentencepiece(("<unk>", 0.0, 2), ("ab", -1.0, 1), ("b", -2.0, 1)))
    data[at % len(data)] = value
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data[: len(data) - cut % len(data)])
    try:
        assert read_sentencepiece(path).pieces
    except RondelError:
        return
