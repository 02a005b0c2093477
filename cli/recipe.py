"""A recipe: the settings of a whole chain as TOML, one section a command, keys that are the options' names.

Every section is a frozen dataclass: the stages' own, and two here for what no stage knows. A section that is left out
leaves its stage out; an empty one runs the stage with its defaults.
"""

from __future__ import annotations

import json
import tomllib
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from rondel.converters.errors import RondelError


@dataclass(frozen=True)
class ModelSection:
    """[model]: what the chain starts from and for whom it works."""

    path: str | None = None  # a Hugging Face folder, relative to the recipe; `build --model` comes before it
    target: Literal["llama.cpp", "rondel"] | None = None  # for every stage that names none itself


@dataclass(frozen=True)
class RunSection:
    """[run]: the text to generate when the file is written. Nothing of it changes the file."""

    prompt: str = "Once upon a time"
    tokens: int = 200  # the most to generate
    temperature: float = 0.8
    seed: int = 0


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: the settings of each section that is there, in the order of the chain."""

    model: Path
    text: tuple[Path, ...]  # [calibrate] text
    sections: dict[str, Any]  # "calibrate" -> CalibrateConfig(...), ...
    replicate_text: tuple[Path, ...] = ()  # [replicate] text


def section_types() -> dict[str, type]:
    """The dataclass of every section, in the order of the chain. Loads torch: the stages own their settings."""
    from rondel.converters.export import ExportConfig
    from rondel.quant.calibrate import CalibrateConfig
    from rondel.quant.quantize import QuantizeConfig
    from rondel.quant.replicate import ReplicateConfig
    from rondel.quant.rotate import RotateConfig

    return {
        "model": ModelSection,
        "calibrate": CalibrateConfig,
        "rotate": RotateConfig,
        "quantize": QuantizeConfig,
        "replicate": ReplicateConfig,
        "export": ExportConfig,
        "run": RunSection,
    }


def load_recipe(
    path: Path, changes: Iterable[str] = (), model: Path | None = None, text: Sequence[Path] = ()
) -> Recipe:
    """Read a recipe, make the changes, check every key; `model` and `text` replace the recipe's own."""
    tables = read_tables(path, changes)
    known = section_types()
    for section in tables:
        if section not in known:
            raise RondelError(f"{path}: unknown section [{section}]; known sections: {', '.join(known)}")
    files = _text_files(path, tables, given=tuple(text))
    fitting = _text_of(path, tables, "replicate") if "text" in tables.get("replicate", {}) else ()
    chosen = settings(ModelSection, tables.pop("model", {}), f"{path} [model]")
    if chosen.path is None and model is None:
        raise RondelError(f"{path}: names no model; use --model MODEL, or write [model] path")
    sections = {}
    for name in known:
        if name in tables or name == "export":  # there is always a file to write
            table = tables.get(name, {})
            if chosen.target and any(field.name == "target" for field in fields(known[name])):
                table = {"target": chosen.target} | table
            sections[name] = settings(known[name], table, f"{path} [{name}]")
    if "quantize" in sections and "rotate" in sections and "type" not in tables["rotate"]:
        # What rotating is decided for is what the chain makes.
        wanted = sections["quantize"].type or sections["quantize"].like
        sections["rotate"] = replace(sections["rotate"], **({"type": wanted} if wanted else {}))
    start = model if model is not None else path.parent / str(chosen.path)
    return Recipe(start, files, sections, fitting)


def recipe_text(recipe: Recipe) -> str:
    """The recipe as TOML with every setting resolved, for the record: what decides the file, and no path."""
    lines = []
    for name, section in recipe.sections.items():
        if isinstance(section, RunSection):
            continue
        texts = {"calibrate": recipe.text, "replicate": recipe.replicate_text}.get(name)
        values: dict[str, Any] = {"text": [file.name for file in texts]} if texts else {}
        values |= {key: value for key, value in asdict(section).items() if value is not None}
        # JSON writes strings, numbers and lists as TOML reads them, but for one control character.
        written = (
            f"{key} = {json.dumps(value, ensure_ascii=False)}".replace("\x7f", "\\u007f")
            for key, value in values.items()
        )
        lines.append("\n".join([f"[{name}]", *written]) + "\n")
    return "\n".join(lines)


def _text_files(path: Path, tables: dict[str, dict[str, Any]], given: tuple[Path, ...]) -> tuple[Path, ...]:
    """[calibrate] text, or what was `given` instead of it."""
    if "calibrate" not in tables:
        return ()
    if given:
        tables["calibrate"].pop("text", None)
        return given
    return _text_of(path, tables, "calibrate")


def _text_of(path: Path, tables: dict[str, dict[str, Any]], section: str) -> tuple[Path, ...]:
    """The one key of a section that names inputs, and so is no setting of the stage; taken out of its table."""
    text = tables[section].pop("text", [])
    if not (isinstance(text, list) and text and all(isinstance(name, str) for name in text)):
        raise RondelError(f"{path} [{section}] text: expected a list of file names, got {text!r}")
    return tuple(path.parent / name for name in text)


def read_tables(path: Path, changes: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """The tables of a recipe, with `section.key=value` changes made; the values are TOML, or else strings."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RondelError(f"{path}: the recipe cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RondelError(f"{path}: the recipe is not valid TOML ({error})") from error
    loose = [key for key, table in tables.items() if not isinstance(table, dict)]
    if loose:
        raise RondelError(f"{path}: {loose[0]} stands outside a section; write it under one, such as [quantize]")
    for change in changes:
        place, equals, value = change.partition("=")
        section, dot, key = place.strip().partition(".")
        if not (equals and dot and section and key):
            raise RondelError(f"--set {change}: expected section.key=value, such as quantize.type=Q4_K_M")
        tables.setdefault(section, {})[key] = _toml_value(value.strip())
    return tables


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # --set quantize.type=Q4_K_M needs no quotes


def settings(cls: type, table: dict[str, Any], where: str) -> Any:
    """The frozen dataclass `cls` filled from a section; unknown keys and wrong types are errors that name `where`."""
    known = {field.name: field for field in fields(cls)}
    for key in table:
        if key not in known:
            raise RondelError(f"{where}: unknown key {key!r}; known keys: {', '.join(known)}")
    hints = typing.get_type_hints(cls)
    values = {key: _converted(value, hints[key], f"{where} {key}") for key, value in table.items()}
    for name, field in known.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise RondelError(f"{where}: the key {name!r} is missing")
    return cls(**values)


def _converted(value: Any, kind: Any, where: str) -> Any:
    """`value` as the type `kind`: lists become tuples, whole numbers become floats where floats are expected."""
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _first_that_fits(value, [choice for choice in choices if choice is not type(None)], where)
    if origin is Literal:
        if value in choices:
            return value
        raise RondelError(f"{where}: expected one of {', '.join(map(str, choices))}, got {value!r}")
    if origin is tuple and isinstance(value, list):
        inner = choices[:1] * len(value) if choices[-1] is Ellipsis else choices
        if len(inner) == len(value):
            return tuple(_converted(item, one, where) for item, one in zip(value, inner, strict=True))
    elif (kind is float and type(value) is int) or type(value) is kind:
        return kind(value)
    expected = {"str": "a string", "int": "a whole number", "float": "a number", "bool": "true or false"}
    name = getattr(kind, "__name__", str(kind))
    raise RondelError(f"{where}: expected {'a list' if origin is tuple else expected.get(name, name)}, got {value!r}")


def _first_that_fits(value: Any, kinds: list[Any], where: str) -> Any:
    refusals = []
    for kind in kinds:
        try:
            return _converted(value, kind, where)
        except RondelError as error:
            refusals.append(error)
    raise refusals[-1]
