"""SentencePiece's pair merging as llama.cpp runs it: the adjacent pair whose token scores highest is joined first.

Written out because the order among equal scores is by position in the text, which a list of ranked merges cannot say.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence

CACHED_WORDS = 1 << 16


class BigramModel:
    """Cuts text with spaces already written as ▁. `bytes_of`: the ids that stand for a character without a token."""

    def __init__(self, ids: Mapping[str, int], scores: Sequence[float], bytes_of: Callable[[str], list[int]]) -> None:
        self._ids = ids
        self._scores = scores
        self._bytes_of = bytes_of
        # Nothing is ever joined across two characters that are neighbours in no token: there the text may be cut
        # without changing the result, and each piece is looked up in the cache.
        self._neighbours = {pair for text in ids if len(text) > 1 for pair in itertools.pairwise(text)}
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; every id stands for a token, or for one byte of a character that is none."""
        ids: list[int] = []
        neighbours, start = self._neighbours, 0
        for end, pair in enumerate(itertools.pairwise(text), 1):
            if pair not in neighbours:
                ids += self._word(text[start:end])
                start = end
        return ids + self._word(text[start:]) if text else ids

    def _word(self, word: str) -> list[int]:
        ids = self._cache.get(word)
        if ids is None:
            ids = self._merge(word)
            if len(self._cache) < CACHED_WORDS:
                self._cache[word] = ids
        return ids

    def _merge(self, word: str) -> list[int]:
        symbols: list[str] = list(word)  # "" once joined to a symbol on its left
        before, after = list(range(-1, len(word) - 1)), [*range(1, len(word)), -1]
        queue: list[tuple[float, int, int, str]] = []  # best first: highest score, then leftmost

        def propose(left: int, right: int) -> None:
            if left >= 0 and right >= 0:
                joined = symbols[left] + symbols[right]
                token = self._ids.get(joined)
                if token is not None:
                    heapq.heappush(queue, (-self._scores[token], left, right, joined))

        for right in range(1, len(word)):
            propose(right - 1, right)
        while queue:
            _, left, right, joined = heapq.heappop(queue)
            if not symbols[left] or not symbols[right] or symbols[left] + symbols[right] != joined:
                continue  # one of the two has grown since
            symbols[left], symbols[right] = joined, ""
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
            propose(before[left], left)
            propose(left, after[left])

        ids: list[int] = []
        for symbol in filter(None, symbols):
            token = self._ids.get(symbol)
            ids += self._bytes_of(symbol) if token is None else [token]
        return ids
