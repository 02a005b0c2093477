"""Chat templates: what models expect comes out, and what a template must not do stays undone."""

from __future__ import annotations

from datetime import datetime

import pytest

from rondel.converters.chat import Message, render
from rondel.converters.errors import RondelError

HELLO: list[Message] = [{"role": "system", "content": "Be <brief>."}, {"role": "user", "content": "Hé?"}]
CHATML = """\
{% for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{ raise_exception('unknown role ' + message['role']) }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def test_chatml() -> None:
    turns = "<|im_start|>system\nBe <brief>.<|im_end|>\n<|im_start|>user\nHé?<|im_end|>\n"
    assert render(CHATML, HELLO) == turns + "<|im_start|>assistant\n"
    assert render(CHATML, HELLO, answer=False) == turns


def test_blocks_leave_no_white_space() -> None:
    assert render("  {% if true %}\na\n  {% endif %}\nb", HELLO) == "a\nb"


def test_what_templates_call() -> None:
    assert (
        render("{{ bos_token }}{{ messages[1].content }}{{ eos_token }}", HELLO, begin="<s>", end="</s>")
        == "<s>Hé?</s>"
    )
    assert render("{{ messages[0] | tojson }}", HELLO) == '{"role": "system", "content": "Be <brief>."}'
    assert render("{{ strftime_now('%d %b %Y') }}", HELLO, now=datetime(2024, 7, 26)) == "26 Jul 2024"
    assert render("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}", HELLO) == "system"
    assert render("{% if tools %}x{% endif %}{{ messages[1:] | length }}", HELLO) == "1"


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "the file has none"),
        ("", "the file has none"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{% for %}", "tokenizer.chat_template fails: "),
        ("{{ messages[0].content + 1 }}", "tokenizer.chat_template fails: "),
        ("{{ 1 / 0 }}", "tokenizer.chat_template fails: division by zero"),
        ("{{ nobody.something }}", "tokenizer.chat_template fails: 'nobody' is undefined"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "tokenizer.chat_template fails: "),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "must not do"),
        ("{{ messages.append(1) }}", "must not do"),
        ("{{ range(1000000) | list }}", "tokenizer.chat_template fails: "),
    ],
)
def test_errors_are_one_sentence(template: str | None, sentence: str) -> None:
    with pytest.raises(RondelError) as caught:
        render(template, HELLO)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
