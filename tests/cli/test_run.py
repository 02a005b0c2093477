"""`rondel run`: what comes out and where, the five reasons to end, and bad input in one sentence."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rondel.cli.generate import Generation, StopStrings
from rondel.converters.tokenizer import Tokenizer
from tests.cli.gguf_model import END, START, TOKENS, TRAINED, write_model
from tests.cli.program import rondel

THE = TOKENS.index("Ġthe")


def told(*arguments: str | Path, stdin: bytes = b"") -> dict[str, Any]:
    done = rondel("run", *arguments, "--json", stdin=stdin)
    assert done.code == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("run") / "tiny.gguf")


@pytest.fixture(scope="module")
def greedy(model: Path) -> dict[str, Any]:
    return told(model, "-p", "the the", "-n", "24", "--temperature", "0", "--ignore-eos")


def test_json_has_the_facts(greedy: dict[str, Any]) -> None:
    assert greedy["stop"] == "length"
    assert greedy["tokens"] == len(greedy["ids"]) == 24
    assert greedy["prompt_tokens"] == 2
    assert greedy["seed"] == 0
    assert greedy["bytes_per_token"] > 4 * 32 * 32
    assert greedy["tokens_per_second"] > 0
    assert greedy["context"] == TRAINED


def test_text_streams_to_stdout_and_statistics_to_stderr(model: Path, greedy: dict[str, Any]) -> None:
    same = ("run", model, "-n", "24", "--temperature", "0", "--ignore-eos")
    done = rondel(*same, "-p", "the the")
    assert done.stdout == greedy["text"] + "\n"
    assert "ended: as many tokens as asked for" in done.stderr
    quiet = rondel(*same, "-p", "the the", "--quiet", "--echo")
    assert quiet.stdout == "the the" + greedy["text"] + "\n"
    assert quiet.stderr == ""


def test_prompt_from_file_and_from_standard_input(model: Path, greedy: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("the the\n")
    settings = ("-n", "24", "--temperature", "0", "--ignore-eos")
    assert told(model, "-f", tmp_path / "prompt.txt", *settings)["ids"] == greedy["ids"]
    assert told(model, *settings, stdin=b"the the\n")["ids"] == greedy["ids"]
    assert told(model, "-f", "-", *settings, stdin=b"the the")["ids"] == greedy["ids"]


def test_the_seed_decides(model: Path) -> None:
    texts = [told(model, "-p", "the", "-n", "16", "--temperature", "2", *more)["ids"] for more in ([], ["--seed", "0"])]
    assert texts[0] == texts[1]
    assert told(model, "-p", "the", "-n", "16", "--temperature", "2", "--seed", "7")["ids"] != texts[0]


def test_threads_change_nothing(model: Path, greedy: dict[str, Any]) -> None:
    settings = ("-p", "the the", "-n", "24", "--temperature", "0", "--ignore-eos")
    assert told(model, *settings, "--threads", "1")["ids"] == told(model, *settings, "--threads", "3")["ids"]


def test_a_stop_string_ends_the_text_before_it(model: Path, greedy: dict[str, Any]) -> None:
    stop = greedy["text"][5:9]  # crosses tokens: they are one to four characters long
    found = told(model, "-p", "the the", "-n", "24", "--temperature", "0", "--ignore-eos", "--stop", stop)
    assert found["stop"] == "stop"
    assert found["text"] == greedy["text"][: greedy["text"].index(stop)]


def test_an_end_token_ends_the_text(tmp_path: Path, greedy: dict[str, Any]) -> None:
    path = write_model(tmp_path / "ends.gguf", **{"tokenizer.ggml.eos_token_id": greedy["ids"][0]})
    found = told(path, "-p", "the the", "-n", "24", "--temperature", "0")
    assert (found["stop"], found["text"], found["tokens"]) == ("end", "", 0)
    assert told(path, "-p", "the the", "-n", "4", "--temperature", "0", "--ignore-eos")["tokens"] == 4


def test_a_full_context_ends_the_text(model: Path) -> None:
    found = told(model, "-p", "the the", "-n", "-1", "--context", "10", "--ignore-eos")
    assert found["stop"] == "context"
    assert found["tokens"] == 10 - 2 + 1  # the last token needs no place: nothing is computed from it


def test_a_context_beyond_training_is_a_warning(model: Path) -> None:
    done = rondel("run", model, "-p", "the", "-n", "1", "--context", str(TRAINED + 1))
    assert done.code == 0
    assert f"warning: --context {TRAINED + 1}: the model was trained with {TRAINED}" in done.stderr


def test_no_tokens_wanted(model: Path) -> None:
    found = told(model, "-p", "the", "-n", "0")
    assert (found["stop"], found["text"], found["tokens_per_second"]) == ("length", "", None)


def test_chat_uses_the_template(model: Path) -> None:
    tokenizer_text = "<|start|>system: Be brief.\n<|start|>user: the\n<|start|>assistant:"
    plain = told(model, "-p", tokenizer_text, "-n", "8", "--temperature", "0")
    chat = told(model, "--chat", "--system", "Be brief.", "-p", "the", "-n", "8", "--temperature", "0")
    assert chat["ids"] == plain["ids"]
    assert chat["prompt_tokens"] == plain["prompt_tokens"]


def test_begin_token_comes_once(tmp_path: Path) -> None:
    path = write_model(tmp_path / "begins.gguf", **{"tokenizer.ggml.add_bos_token": True})
    assert told(path, "-p", "the", "-n", "1")["prompt_tokens"] == 2
    assert told(path, "-p", "<|start|>the", "-n", "1")["prompt_tokens"] == 2
    assert told(path, "-p", "", "-n", "1")["prompt_tokens"] == 1


def test_interrupt_ends_cleanly(model: Path) -> None:
    command = [sys.executable, "-m", "rondel.cli", "run", str(model), "-p", "the", "-n", "-1"]
    running = subprocess.Popen(
        [*command, "--context", "100000", "--ignore-eos"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell that starts the tests in the background has them ignore interrupts, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - nothing here holds a lock
    )
    assert running.stdout is not None
    assert running.stdout.read(1)  # it has begun
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130
    assert b"ended: interrupted" in errors
    assert b"Traceback" not in errors


def test_a_reader_that_leaves_is_no_error(model: Path) -> None:
    command = [sys.executable, "-m", "rondel.cli", "run", str(model), "-p", "the", "-n", "-1", "--quiet"]
    running = subprocess.Popen(
        [*command, "--context", "100000", "--ignore-eos"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert running.stdout is not None
    assert running.stderr is not None
    assert running.stdout.read(1)
    running.stdout.close()
    assert running.stderr.read() == b""
    assert running.wait(timeout=60) == 141


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["{model}", "-p", ""], 1, "the prompt is empty, and this model has no token to begin a text with"),
        (["{model}", "-p", "the " * 20, "--context", "16"], 1, "the prompt has 21 tokens, the context holds 16"),
        (["{model}.none", "-p", "the"], 1, "{model}.none"),
        (["{text}", "-p", "the"], 1, "GGUF"),
        (["{model}", "-f", "{model}.none"], 1, "{model}.none: cannot be read"),
        (["{model}", "-p", "the", "-f", "{text}"], 2, "exclude each other"),
        (["{model}", "-p", "the", "--system", "x"], 2, "--system needs --chat"),
        (["{model}", "-p", "the", "--top-p", "2"], 2, "--top-p"),
        (["{model}", "-p", "the", "--top-p", "0"], 1, "top_p"),
        (["{plain}", "-p", "the", "--chat"], 1, "tokenizer.chat_template: the file has none"),
        (["{mixed}", "-p", "the"], 1, "tokenizer.ggml.tokens: 264 tokens, but the model predicts 265"),
        (["{silent}", "-p", "the"], 1, "tokenizer.ggml.model: the file has no such key"),
    ],
)
def test_bad_input_is_one_sentence(model: Path, tmp_path: Path, arguments: list[str], code: int, sentence: str) -> None:
    names = {"model": str(model), "text": str(tmp_path / "text"), "plain": str(tmp_path / "plain")}
    names |= {"silent": str(tmp_path / "silent"), "mixed": str(tmp_path / "mixed")}
    (tmp_path / "text").write_text("Once upon a time there was no model in this file.")
    write_model(tmp_path / "mixed", **{"tokenizer.ggml.tokens": TOKENS[:-1]})
    write_model(tmp_path / "plain", **{"tokenizer.chat_template": None})
    write_model(tmp_path / "silent", **{"tokenizer.ggml.model": None})
    done = rondel("run", *(argument.format(**names) for argument in arguments))
    assert done.code == code
    assert sentence.format(**names) in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_imports_nothing_heavy(model: Path) -> None:
    program = (
        "import sys\nfrom rondel.cli.main import main\n"
        f"sys.argv = ['rondel', 'run', {str(model)!r}, '-p', 'the', '-n', '2', '--quiet']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = ('torch', 'transformers', 'gguf', 'jinja2', 'rich.console', 'safetensors')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


# ---- the loop, with a model that says what it is told to ----


class Script:
    """A session whose next token is the next of a list; holds `context` tokens."""

    bytes_read = 10

    def __init__(self, ids: list[int], context: int = 100) -> None:
        self.ids, self.context, self.length = ids, context, 0
        self.evaluated: list[int] = []

    def prefill(self, tokens: list[int]) -> None:
        self.length += len(tokens)
        self.evaluated += tokens

    def eval(self, tokens: list[int]) -> np.ndarray:
        self.prefill(tokens)
        logits = np.zeros((1, len(TOKENS)), np.float32)
        logits[0, self.ids.pop(0)] = 1
        return logits


class Likeliest:
    """A sampler that remembers what it was told."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def accept(self, token: int) -> None:
        self.accepted.append(token)

    def next(self, logits: np.ndarray) -> int:
        return int(logits.argmax())


def answered(script: Script, prompt: list[int], **settings: Any) -> tuple[Any, list[str], Likeliest]:
    keys = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [1] * START + [3, 3],
        "tokenizer.ggml.eos_token_id": END,
    }
    shown: list[str] = []
    sampler = Likeliest()
    generation = Generation(script, Tokenizer(keys), sampler, show=shown.append, **settings)  # type: ignore[arg-type]
    return generation.run(prompt), shown, sampler


def test_half_characters_are_not_shown() -> None:
    euro = [TOKENS.index(character) for character in "âĤ¬"]
    answer, shown, _ = answered(Script([*euro, THE, END]), [THE], limit=10)
    assert shown == ["€", " the"]
    answer, shown, _ = answered(Script([*euro[:2], END]), [THE], limit=10)
    assert answer.text == "\ufffd"
    assert shown == ["\ufffd"]
    assert answer.reason == "end"


def test_text_held_back_for_a_stop_string_comes_in_the_end() -> None:
    answer, shown, _ = answered(Script([THE, THE, END]), [THE], limit=10, stop=["the!"])
    assert answer.text == "".join(shown) == " the the"


def test_a_long_prompt_is_evaluated_once_and_in_order() -> None:
    prompt = [number % START for number in range(1300)]
    script = Script([THE, END], context=2000)
    _, _, sampler = answered(script, prompt, limit=5)
    assert script.evaluated == [*prompt, THE]
    assert sampler.accepted == [*prompt, THE]


def test_end_tokens_are_never_chosen_when_ignored() -> None:
    answer, _, _ = answered(Script([END, END, END]), [THE], limit=2, ignore_end=True)
    assert answer.reason == "length"
    assert END not in answer.ids


def test_bytes_and_steps_count_what_was_evaluated_for_the_answer() -> None:
    answer, _, _ = answered(Script([THE] * 5), [THE, THE], limit=4)
    assert (len(answer.ids), answer.steps, answer.bytes_read) == (4, 3, 30)


@given(
    st.text(alphabet="ab", max_size=20),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(1, 4), min_size=20, max_size=20),
)
def test_stop_strings_do_not_depend_on_how_text_is_cut(text: str, stops: list[str], sizes: list[int]) -> None:
    strings, shown, at = StopStrings(stops), "", 0
    for size in sizes:
        if not strings.found:
            shown += strings.feed(text[at : at + size])
            assert not any(stop in shown for stop in stops)
        at += size
    shown += strings.finish()
    ends = [place + len(stop) for stop in stops if (place := text.find(stop)) >= 0]
    assert strings.found == bool(ends)
    if not ends:
        assert shown == text
    else:
        # Whichever stop string is complete first decides; it begins where the shown text ends.
        assert any(text.startswith(shown + stop) for stop in stops)
