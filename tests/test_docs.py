"""The documentation is true: help texts, the README's command reference and configs/default.toml match the program.

`python tests/test_docs.py` writes the reference anew.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

from rondel.cli.main import COMMANDS, load_command

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
START, END = "<!-- commands: written by tests/test_docs.py -->\n", "<!-- end of commands -->\n"


def options(command: Any) -> list[tuple[str, str]]:
    """(how to write it, what it means) of every argument and option."""
    rows = []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            rows.append((parameter.metavar, parameter.help))
            continue
        names = ", ".join([*parameter.opts, *parameter.secondary_opts])
        value = "" if parameter.is_flag else f" {parameter.metavar or parameter.name.rstrip('_').upper()}"
        default, meaning = parameter.default, parameter.help or ""
        if default not in (None, False, True, "", ()) and "Default:" not in meaning:
            meaning += f" Default: {default}."
        rows.append(((names + value).replace("|", "\\|"), meaning))
    return rows


def reference() -> str:
    """The README's command reference."""
    parts = []
    for name in COMMANDS:
        command = load_command(name)
        summary, _, rest = command.help.partition("\n\n")
        body, _, example = rest.partition("Example:\n\n\b\n")
        text = " ".join(body.split())
        code = "\n".join(line.strip() for line in example.strip().splitlines())
        rows = "\n".join(f"| `{written}` | {meaning} |" for written, meaning in options(command))
        parts.append(
            f"<details><summary><code>rondel {name}</code>: {summary}</summary>\n\n{text}\n\n```\n{code}\n```\n\n"
            f"| | |\n|---|---|\n{rows}\n\n</details>\n"
        )
    return "\n".join(parts)


@pytest.mark.parametrize("name", COMMANDS)
def test_everything_has_help(name: str) -> None:
    command = load_command(name)
    assert command.help.split("\n\n")[0].replace("\n", " ") == COMMANDS[name], "cli/main.py tells another first line"
    for written, meaning in options(command):
        assert meaning, f"rondel {name} {written} has no help text"
        assert meaning.strip().endswith((".", ".)")), f"rondel {name} {written}: help is a sentence"


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_are_valid(name: str) -> None:
    """Every example in a help text parses: its options exist and its arguments are complete."""
    _, found, example = load_command(name).help.partition("Example:\n\n\b\n")
    assert found, f"rondel {name} --help shows no example"
    for line in example.strip().splitlines():
        program, verb, *arguments = shlex.split(line.split(" | ")[0])
        assert program == "rondel"
        load_command(verb).make_context(verb, arguments)  # raises a usage error for what does not exist


def test_the_readme_has_the_reference() -> None:
    text = README.read_text(encoding="utf-8")
    assert START in text
    written = text.split(START)[1].split(END)[0]
    assert written == reference(), "run `python tests/test_docs.py`"


def test_the_readme_starts_with_the_two_commands() -> None:
    first = README.read_text(encoding="utf-8").split("```")[1]
    assert [line.split("#")[0].strip() for line in first.strip().splitlines()] == ["make demo", "make test"]


def test_the_readme_chain_is_valid() -> None:
    lines = [line[2:] for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("$ rondel ")]
    assert [line.split()[1] for line in lines] == list(COMMANDS)[:6]
    for line in lines:
        _, verb, *arguments = shlex.split(line)
        load_command(verb).make_context(verb, arguments)


def _readme_python() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)


def test_the_readme_python_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in _readme_python():
        exec(compile(block, "README.md", "exec"), names)
    assert names["logits"].shape == (3, 2048)


# A word of Python, and an option that is repeated: it is one, a key is all.
RENAMED = {"type": "type_", "rotate": "rotate_", "tensors": "tensor", "layers": "layer"}


@pytest.mark.parametrize("verb", ["calibrate", "rotate", "quantize", "replicate", "export"])
def test_options_are_the_settings(verb: str) -> None:
    """Every key of a stage's dataclass is an option of its command, with the same default."""
    options_ = {parameter.name: parameter for parameter in load_command(verb).params}
    for field in dataclasses.fields(_sections()[verb]):
        option = options_[RENAMED.get(field.name, field.name)]
        empty = (None, (), [])
        assert option.default == field.default or (option.default in empty and field.default in empty), field.name


def _sections() -> dict[str, type]:
    from rondel.cli.recipe import section_types

    return section_types()


def test_default_toml_shows_every_key_with_its_default() -> None:
    text = (ROOT / "configs/default.toml").read_text(encoding="utf-8")
    tables = tomllib.loads(text)
    sections = _sections()
    assert list(tables) == list(sections)
    for section, cls in sections.items():
        block = re.split(r"^\[\w+\]$", text, flags=re.M)[list(sections).index(section) + 1]
        keys = [field.name for field in dataclasses.fields(cls)]
        shown = re.findall(r"^(?:# )?(\w+) = ", block, flags=re.M)
        assert shown == [*(["text"] if section in ("calibrate", "replicate") else []), *keys], f"[{section}]"
        for field in dataclasses.fields(cls):
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc]
            if default is None:
                assert field.name not in tables[section], f"[{section}] {field.name}: not set is its default"
            else:
                value = tables[section][field.name]
                assert (tuple(value) if isinstance(value, list) else value) == default, f"[{section}] {field.name}"
            line = re.search(rf"^(?:# )?{field.name} = .*", block, flags=re.M)
            assert line is not None
            assert re.search(r"  # \S", line.group()), f"[{section}] {field.name}: say in a comment what it is for"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_recipes_are_valid(path: Path) -> None:
    from rondel.cli.recipe import load_recipe

    load_recipe(path, model=Path("model"))


def write() -> None:
    """Put the reference into README.md."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(START)
    README.write_text(before + START + reference() + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    write()
