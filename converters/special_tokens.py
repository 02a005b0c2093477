"""The special tokens and the chat template of a checkpoint as GGUF keys: the ids, and which are added to a text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rondel.converters.errors import RondelError
from rondel.converters.gguf_keys import Tokenizer
from rondel.converters.side_files import read_json

_ID_KEYS = {
    "bos": Tokenizer.BOS,
    "eos": Tokenizer.EOS,
    "unk": Tokenizer.UNKNOWN,
    "sep": Tokenizer.SEPARATOR,
    "pad": Tokenizer.PADDING,
    "cls": Tokenizer.CLS,
    "mask": Tokenizer.MASK,
    "eot": Tokenizer.EOT,
}
_ADD_KEYS = {"bos": Tokenizer.ADD_BOS, "eos": Tokenizer.ADD_EOS, "sep": Tokenizer.ADD_SEP}


def _named(entry: Any) -> str | None:
    """A special token in tokenizer_config.json: its text, or an object that holds it."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) and text else None


def _special(part: Any) -> str | None:
    """The special token of one part of a template, if it is one."""
    token = part.get("SpecialToken") if isinstance(part, dict) else None
    return token.get("id") if isinstance(token, dict) and isinstance(token.get("id"), str) else None


def _read_template(processor: dict[str, Any], names: dict[str, str], adds: dict[str, bool]) -> None:
    """What a TemplateProcessing puts before, between and behind the text. Corrects `names`, fills `adds`."""
    single = processor.get("single") or []
    pair = processor.get("pair") or []
    first = last = None
    if len(single) > 1:
        first, last = _special(single[0]), _special(single[-1])
        if first:
            names.setdefault("bos", first)
            names.setdefault("cls", first)
            adds["bos"] = first in (names["bos"], names["cls"])
        if last:
            if names.get("eos") not in (None, last):
                names["eot"] = names["eos"]  # the configured end of text ends a turn then
            names["eos"] = last
            adds["eos"] = True
    start = 1 if pair and first and _special(pair[0]) == first else 0
    stop = -1 if pair and last and _special(pair[-1]) == last else None
    between = [_special(part) for part in pair[start:stop][1:-1]]
    if between:
        separators = [name for name in (names.get("sep"), names.get("eos")) if name]
        adds["sep"] = (between[0] in separators and not last) or (len(between) == 2 and between[1] in separators)
        if adds["sep"] and "sep" not in names and "eos" in names:
            names["sep"] = names["eos"]


def _chat_templates(files: Mapping[str, Path], config: dict[str, Any]) -> dict[str, Any]:
    """The chat template, and further named ones."""
    template = config.get("chat_template")
    if template is None and "chat_template.jinja" in files:
        try:
            template = files["chat_template.jinja"].read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RondelError(f"{files['chat_template.jinja']}: cannot be read ({error})") from error
    if isinstance(template, str):
        return {Tokenizer.CHAT_TEMPLATE: template}
    if not isinstance(template, list):
        return {}
    named: dict[str, str] = {}
    for choice in template:
        if isinstance(choice, dict) and isinstance(choice.get("name"), str) and isinstance(choice.get("template"), str):
            named[re.sub("[^A-Za-z0-9]", "_", choice["name"])] = choice["template"]
    default = named.pop("default", None)
    keys: dict[str, Any] = {Tokenizer.CHAT_TEMPLATE_NAMED.format(name=name): text for name, text in named.items()}
    if named:
        keys[Tokenizer.CHAT_TEMPLATES] = sorted(named)
    return keys | ({} if default is None else {Tokenizer.CHAT_TEMPLATE: default})


def _template_tokens(tokenizer: dict[str, Any], config: dict[str, Any]) -> tuple[dict[str, str], dict[str, bool]]:
    """The special tokens by kind, as texts, and which kinds the tokenizer adds to a text."""
    names = {kind: name for kind in _ID_KEYS if kind != "eot" and (name := _named(config.get(f"{kind}_token")))}
    if "cls" in names:
        names.setdefault("bos", names["cls"])
    if "sep" in names:
        names.setdefault("eos", names["sep"])
    adds: dict[str, bool] = {}
    processor = tokenizer.get("post_processor")
    parts = (processor.get("processors") or [processor]) if isinstance(processor, dict) else []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "ByteLevel":
            adds.setdefault("bos", False)
            adds.setdefault("eos", False)
        elif kind == "TemplateProcessing":
            _read_template(part, names, adds)
    for kind in _ADD_KEYS:
        if isinstance(flag := config.get(f"add_{kind}_token"), bool):
            adds.setdefault(kind, flag)
    return names, adds


def _configured_ids(files: Mapping[str, Path]) -> dict[str, int]:
    """The ids in config.json; the ends of text also from generation_config.json."""
    ids: dict[str, int] = {}
    generation = read_json(files.get("generation_config.json"))
    ends: dict[str, Any] = {}
    for kind in ("bos", "eos"):
        end = generation.get(f"{kind}_token_id")
        ends[kind] = end[0] if isinstance(end, list) and end else end
    model = read_json(files.get("config.json"))
    for kind in _ID_KEYS:
        for found in (model.get(f"{kind}_token_id"), ends.get(kind)):
            if isinstance(found, int) and not isinstance(found, bool):
                ids.setdefault(kind, found)
    return ids


def special_token_keys(
    files: Mapping[str, Path], tokenizer: dict[str, Any], config: dict[str, Any], size: int
) -> dict[str, Any]:
    """Ids, add_*_token flags and chat templates.

    `tokenizer` and `config` are tokenizer.json and tokenizer_config.json; ids that they leave open come from
    config.json, the ends of text from generation_config.json at last. Ids at or beyond `size` are left out.
    """
    names, adds = _template_tokens(tokenizer, config)
    ids: dict[str, int] = {}
    if config:  # without tokenizer_config.json nobody said which of the added tokens is which
        texts: dict[Any, Any] = {}
        for entry in tokenizer.get("added_tokens") or []:
            if isinstance(entry, dict):
                texts.setdefault(entry.get("content"), entry.get("id"))
        ids = {kind: texts[name] for kind, name in names.items() if isinstance(texts.get(name), int)}
    ids = _configured_ids(files) | ids
    keys: dict[str, Any] = {key: ids[kind] for kind, key in _ID_KEYS.items() if kind in ids and 0 <= ids[kind] < size}
    keys |= {key: adds[kind] for kind, key in _ADD_KEYS.items() if kind in adds}
    return keys | _chat_templates(files, config)
