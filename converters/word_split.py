"""How byte-level BPE vocabularies cut text into words, by the name a GGUF keeps in `tokenizer.ggml.pre`.

The expressions are facts of the vocabularies: the cut decides the tokens, so each is written as llama.cpp applies it
(one expression after another, each on the pieces that the one before left; match and gap are both pieces).
"""

from __future__ import annotations

from dataclasses import dataclass

from rondel.converters.errors import RondelError

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_LAST_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"


def _words(digits: str, before: str = _CONTRACTIONS + "|") -> str:
    return rf"{before}[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|{_SYMBOLS}|{_LAST_SPACES}"


_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",)
_STARCODER = (r"\p{N}", *_GPT2)
_LLAMA3 = (_words(r"\p{N}{1,3}"),)
_QWEN2 = (_words(r"\p{N}"),)
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_LAST_SPACES}",
)
# Letters are told apart by ASCII case alone, as llama.cpp does: every other letter counts as both cases.
_UPPER, _LOWER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"


def _cased(digits: str, contractions: str) -> str:
    first = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{first}{_UPPER}*{_LOWER}+{contractions}|{first}{_UPPER}+{_LOWER}*{contractions}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_LAST_SPACES}"
    )


# Letters with two cases (Latin, Greek, Cyrillic, ...): the list is deepseek-llm's own, not a Unicode class.
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-"
    "\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc"
    "\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f"
    "\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b"
    "\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
# The range from U+0800 holds spaces (U+2028, U+3000 and others), which llama.cpp takes for nothing but spaces.
_DEEPSEEK_CJK = "(?:(?!\\s)[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff])+"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3001\u3002]+",
    r"\s+\z",
    _DEEPSEEK_CJK,
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LAST_SPACES}",
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", *_GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", *_GPT2, r"[0-9][0-9][0-9]")


@dataclass(frozen=True)
class WordSplit:
    """The expressions in their order, and what llama.cpp takes from the same name."""

    expressions: tuple[str, ...]
    whole_words: bool = False  # a word that is a token stays whole, whatever the merges say
    add_bos: bool = False  # where the file does not say


_KINDS: tuple[tuple[tuple[str, ...], WordSplit], ...] = (
    (("default",), WordSplit(_DEFAULT)),
    (
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        WordSplit(_LLAMA3, whole_words=True, add_bos=True),
    ),
    (("dbrx", "smaug-bpe", "chatglm-bpe"), WordSplit(_LLAMA3)),
    (("glm4", "glm5"), WordSplit(_LLAMA3, whole_words=True)),
    (("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan", "grok-2"), WordSplit(_QWEN2)),
    (("qwen35",), WordSplit(_QWEN35)),
    (("deepseek-llm",), WordSplit(_DEEPSEEK_LLM)),
    (("deepseek-coder",), WordSplit(_DEEPSEEK_CODER)),
    (("deepseek-v3", "hunyuan-dense"), WordSplit(_DEEPSEEK3)),
    (("gpt-2", "phi-2", "gigachat", "a.x-4.0", "mellum", "mpt", "olmo", "jais", "exaone4"), WordSplit(_GPT2)),
    (("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"), WordSplit(_STARCODER)),
    (("falcon",), WordSplit(_FALCON)),
    (("tekken",), WordSplit((_cased(r"\p{N}", ""),), whole_words=True, add_bos=True)),
    (("gpt-4o", "llama4", "kanana2"), WordSplit((_cased(r"\p{N}{1,3}", _CONTRACTIONS + "?"),))),
)
WORD_SPLITS = {name: kind for names, kind in _KINDS for name in names}


def word_split(name: str) -> WordSplit:
    """The cut that `tokenizer.ggml.pre` names; `RondelError` for one whose rules are not known here."""
    if name not in WORD_SPLITS:
        raise RondelError(
            f"tokenizer.ggml.pre: {name!r} is a way to cut words that rondel does not know; "
            f"known are {', '.join(sorted(WORD_SPLITS))}"
        )
    return WORD_SPLITS[name]
