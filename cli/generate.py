"""The loop behind `rondel run`: a prompt goes in, tokens come out, and one of five reasons ends it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from rondel.converters.errors import RondelError
from rondel.converters.tokenizer import StreamDecoder, Tokenizer
from rondel.native import Model, Sampler, Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

Reason = Literal["end", "stop", "length", "context", "interrupted"]
REASONS: dict[Reason, str] = {
    "end": "the model ended the text",
    "stop": "a stop string came",
    "length": "as many tokens as asked for",
    "context": "the context is full; --context makes it longer",
    "interrupted": "interrupted",
}
PROMPT_STEP = 512  # tokens evaluated between two looks at the keyboard


def tokenizer_of(model: Model) -> Tokenizer:
    """The vocabulary in the model's file; `RondelError` where it is not the one that the model predicts."""
    tokenizer = Tokenizer(model.file.keys)
    if tokenizer.vocabulary_size != model.vocabulary:
        raise RondelError(
            f"tokenizer.ggml.tokens: {tokenizer.vocabulary_size} tokens, but the model predicts {model.vocabulary}: "
            "the file was put together from two models; convert it again"
        )
    return tokenizer


class StopStrings:
    """Passes text on until one of the strings appears in it, wherever the pieces are cut."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = [text for text in strings if text]
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """What can be shown: all that is not, and cannot become, part of a stop string."""
        held = self._held + text
        places = [place for place in (held.find(string) for string in self._strings) if place >= 0]
        if places:
            self.found, self._held = True, ""
            return held[: min(places)]
        keep = max((self._overlap(held, string) for string in self._strings), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """What was held back, where no stop string came of it."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def _overlap(text: str, string: str) -> int:
        """The most characters at the end of `text` with which `string` begins."""
        longest = min(len(text), len(string) - 1)
        return next((count for count in range(longest, 0, -1) if text.endswith(string[:count])), 0)


@dataclass
class Answer:
    """What came out, and what it took: seconds, and bytes of weights and cache read for the answer's tokens."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    reason: Reason = "length"
    prompt_seconds: float = 0.0
    seconds: float = 0.0
    steps: int = 0  # evaluations after the prompt's: one fewer than tokens, or as many
    bytes_read: int = 0


class Generation:
    """Continues a prompt by at most `limit` tokens (None: until the context is full), showing text as it comes."""

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        sampler: Sampler,
        *,
        limit: int | None,
        stop: Sequence[str] = (),
        ignore_end: bool = False,
        show: Callable[[str], None],
    ) -> None:
        self._session, self._tokenizer, self._sampler = session, tokenizer, sampler
        self._limit, self._ignore_end, self._show = limit, ignore_end, show
        self._strings = StopStrings(stop)
        self._decoder = StreamDecoder(tokenizer)

    def run(self, prompt: Sequence[int]) -> Answer:
        """The answer to `prompt`, one token or more; an interrupt ends it like any other reason."""
        answer = Answer()
        try:
            self._continue(self._read(prompt, answer), answer)
        except KeyboardInterrupt:
            answer.reason = "interrupted"
        if not self._strings.found:
            self._pass_on(self._strings.feed(self._decoder.finish()), answer)
            self._pass_on(self._strings.finish(), answer)
        return answer

    def _read(self, prompt: Sequence[int], answer: Answer) -> NDArray[np.float32]:
        started = time.perf_counter()
        for token in prompt:
            self._sampler.accept(token)
        last = (len(prompt) - 1) // PROMPT_STEP * PROMPT_STEP
        for at in range(0, last, PROMPT_STEP):
            self._session.prefill(prompt[at : at + PROMPT_STEP])
        logits = self._session.eval(prompt[last:])
        answer.prompt_seconds = time.perf_counter() - started
        return logits

    def _continue(self, logits: NDArray[np.float32], answer: Answer) -> None:
        started = time.perf_counter()
        try:
            while len(answer.ids) != self._limit:
                reason = self._accept(self._choose(logits), answer)
                if reason is None and len(answer.ids) != self._limit and self._session.length == self._session.context:
                    reason = "context"  # no place for this token, so nothing can follow it
                if reason is not None:
                    answer.reason = reason
                    return
                if len(answer.ids) != self._limit:  # else nobody would use what follows
                    logits = self._session.eval(answer.ids[-1:])
                    answer.steps += 1
                    answer.bytes_read += self._session.bytes_read
        finally:
            answer.seconds = time.perf_counter() - started

    def _choose(self, logits: NDArray[np.float32]) -> int:
        if self._ignore_end:
            logits[..., self._tokenizer.ends] = -np.inf
        return self._sampler.next(logits)

    def _accept(self, token: int, answer: Answer) -> Reason | None:
        if self._tokenizer.is_end(token):
            return "end"
        self._sampler.accept(token)
        answer.ids.append(token)
        self._pass_on(self._strings.feed(self._decoder.feed(token)), answer)
        return "stop" if self._strings.found else None

    def _pass_on(self, text: str, answer: Answer) -> None:
        if text:
            answer.text += text
            self._show(text)
