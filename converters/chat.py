"""Renders the chat template of a GGUF file (`tokenizer.chat_template`): messages in, the model's prompt out.

A template is a program from a file that nobody has checked, so it runs in jinja2's sandbox: it sees the values given
here and nothing else, and cannot change them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn, TypedDict

from rondel.converters.errors import RondelError


class Message(TypedDict):
    """One turn. `role`: system, user or assistant."""

    role: str
    content: str


def render(
    template: str | None,
    messages: Sequence[Message],
    *,
    begin: str = "",
    end: str = "",
    answer: bool = True,
    now: datetime | None = None,
) -> str:
    """The prompt that ends where the model's answer begins (`answer`). `begin`, `end`: the names of those tokens.

    `now` is what the template's clock shows, for the same text every day; without it, the time of today.
    """
    if not template:
        raise RondelError("tokenizer.chat_template: the file has none; run it without --chat, as a text model")
    from jinja2 import TemplateError
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=False, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = _to_json
    sandbox.globals["raise_exception"] = _refuse
    sandbox.globals["strftime_now"] = (now or datetime.now()).strftime
    try:
        return sandbox.from_string(template).render(
            messages=list(messages), bos_token=begin, eos_token=end, add_generation_prompt=answer, tools=None
        )
    except _RefusedError as error:
        raise RondelError(f"tokenizer.chat_template refuses these messages: {_line(error)}") from None
    except SecurityError as error:
        raise RondelError(f"tokenizer.chat_template does what a template must not do: {_line(error)}") from None
    except (TemplateError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise RondelError(f"tokenizer.chat_template fails: {_line(error)}; run the file without --chat") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _RefusedError(Exception):
    """The template called raise_exception."""


def _refuse(sentence: object) -> NoReturn:
    raise _RefusedError(str(sentence))


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Unlike jinja2's own filter: no escapes for HTML, which the models have never seen.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
