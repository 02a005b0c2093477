"""Recognises how tokenizer.json splits text before byte-level BPE, under the names that llama.cpp gives these splits.

llama.cpp keeps one name a model; many names mean one and the same split. The name written here is one whose split, and
whose use of merges, is that of the file.
"""

from __future__ import annotations

from typing import Any

from rondel.converters.errors import RondelError

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_TAIL}"
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_CASED_TAIL}"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_CASED_TAIL}"
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
_DEEPSEEK_LLM = ("[\r\n]", "\\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿ")  # the second is the start of a list of all cased letters

# A step is what it does: ("split", regex), ("digits", one by one), ("bytes", splits by GPT-2's own regex).
_BYTES, _GPT2 = ("bytes", False), ("bytes", True)
Steps = tuple[tuple[str, Any], ...]

# Steps and whether a whole word that is a token is taken without merging -> llama.cpp's name.
_NAMES: dict[tuple[Steps, bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((("digits", True), _GPT2), False): "smollm",
    ((("split", _LLAMA3), _BYTES), True): "llama-bpe",
    ((("split", _LLAMA3), _BYTES), False): "smaug-bpe",
    ((("split", _QWEN2), _BYTES), False): "qwen2",
    ((("split", _QWEN35), _BYTES), False): "qwen35",
    ((("split", _TEKKEN), _BYTES), True): "tekken",
    ((("split", _GPT4O), _BYTES), False): "gpt-4o",
    ((*(("split", pattern) for pattern in _DEEPSEEK_V3), _BYTES), False): "deepseek-v3",
}


def _step(part: dict[str, Any]) -> tuple[str, Any] | None:
    kind = part.get("type")
    if kind == "ByteLevel" and not part.get("add_prefix_space", True):
        return ("bytes", part.get("use_regex", True))
    if kind == "Digits":
        return ("digits", part.get("individual_digits", False))
    if kind == "Split":
        # A pattern that matches every character may keep the matches or drop what is between them.
        if (part.get("behavior"), part.get("invert", False)) not in (("Isolated", False), ("Removed", True)):
            return None
        pattern = part.get("pattern")
        return ("split", pattern.get("Regex")) if isinstance(pattern, dict) else None
    return None


def _steps(pre_tokenizer: Any) -> Steps | None:
    """The pre-tokenizer as a flat list of steps; None where a part of it is unknown."""
    if not isinstance(pre_tokenizer, dict):
        return None
    parts = pre_tokenizer.get("pretokenizers") if pre_tokenizer.get("type") == "Sequence" else [pre_tokenizer]
    if not isinstance(parts, list):
        return None
    steps = [_step(part) if isinstance(part, dict) else None for part in parts]
    known = tuple(step for step in steps if step is not None)
    return known if len(known) == len(steps) else None


def _is_deepseek_llm(steps: Steps) -> bool:
    splits = [value for kind, value in steps if kind == "split" and isinstance(value, str)]
    return len(splits) >= 5 and splits[0] == _DEEPSEEK_LLM[0] and splits[1].startswith(_DEEPSEEK_LLM[1])


def _normalizer_is_plain(normalizer: Any) -> bool:
    """No normalization, or NFC: llama.cpp leaves that out for every model (it changes few texts)."""
    return not normalizer or (isinstance(normalizer, dict) and normalizer.get("type") == "NFC")


def recognise(tokenizer: dict[str, Any], where: str) -> str:
    """The value of tokenizer.ggml.pre for a byte-level BPE tokenizer.json; refuses one that is unknown."""
    steps = _steps(tokenizer.get("pre_tokenizer"))
    if steps is not None and _normalizer_is_plain(tokenizer.get("normalizer")):
        ignore_merges = bool(tokenizer["model"].get("ignore_merges", False))
        name = _NAMES.get((steps, ignore_merges))
        if name is not None:
            return name
        if not ignore_merges and _is_deepseek_llm(steps):
            return "deepseek-llm"
    raise RondelError(
        f"{where}: its pre-tokenizer is none that rondel knows; "
        "if llama.cpp has a name for it, give that name with --pre (for example --pre llama-bpe)"
    )
