"""A budget of bytes: how it is asked for, what formats take of it, and which formats are worth a trial."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rondel.converters.errors import RondelError
from rondel.converters.gguf_writer import padded
from rondel.native.formats import format_bytes
from rondel.quant.fallbacks import is_tile
from rondel.quant.importance import Importance
from rondel.quant.mixtures import MIXTURES, mixture_named

FLOAT_BYTES = 4  # norms, biases and RoPE factors stay F32
# Formats below this share of the mean bits are not tried: the IQ1 types encode slowly. Up to four bits they are worth
# it: the best allocation at 3.1 bits gives the weakest matrices half of that, without IQ1 it is 5 % worse (prose-7m).
LEAST_SHARE = 0.35

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Budget:
    """What a model may take: one of bits a weight, bytes of the GGUF file, or a mixture whose file is as large."""

    bpw: float | None = None
    size: int | None = None
    like: str | None = None

    @property
    def option(self) -> str:
        """The option as the user gives it, for messages."""
        if self.like is not None:
            return f"--like {self.like}"
        return f"--size {self.size}" if self.size is not None else f"--bpw {self.bpw:g}"


def budget_of(bpw: float | None, size: int | None, like: str | None) -> Budget | None:
    """The budget that was asked for, or None. Raises RondelError for two of them, and for values that mean nothing."""
    given = [f"--{name}" for name, value in (("bpw", bpw), ("size", size), ("like", like)) if value is not None]
    if not given:
        return None
    if len(given) > 1:
        raise RondelError(f"{' and '.join(given)}: each says how large the model may be; give one of them")
    if bpw is not None and not (math.isfinite(bpw) and bpw > 0):
        raise RondelError(f"--bpw {bpw}: expected a positive number of bits a weight, such as 2.7")
    if size is not None and size <= 0:
        raise RondelError(f"--size {size}: expected a positive number of bytes, such as 900M")
    if like is not None:
        like = mixture_named(like)
        if is_tile(like):
            raise RondelError(f"--like {like}: expected one of llama.cpp's mixtures: {', '.join(MIXTURES)}")
    return Budget(bpw, size, like)


def check_statistics(budget: Budget, importance: Importance | None) -> None:
    """Refuse what no sensitivities can be measured with."""
    if importance is None or importance.stats is None or importance.stats.windows() is None:
        given = importance.name if importance else "none are given"
        raise RondelError(
            f"{budget.option}: needs statistics with the tokens of their text ({given}); "
            "run rondel calibrate and give its folder with --stats"
        )


@dataclass(frozen=True)
class Account:
    """How many bytes formats take, every tensor up to a multiple of `alignment`, on top of `overhead`."""

    shapes: Shapes
    alignment: int = 1
    overhead: int = 0

    def tensor(self, name: str, format: str | None) -> int:
        """Bytes of one tensor; None: it stays F32."""
        shape = self.shapes[name]
        size = format_bytes(format, *shape) if format else FLOAT_BYTES * math.prod(shape)
        return padded(size, self.alignment)

    def total(self, formats: Mapping[str, str]) -> int:
        """Bytes of everything."""
        return self.overhead + sum(self.tensor(name, formats.get(name)) for name in self.shapes)

    def smallest(self, tried: Mapping[str, Sequence[str]]) -> dict[str, str]:
        """The format of each matrix that takes the fewest bytes."""
        return {name: min(formats, key=lambda f: self.tensor(name, f)) for name, formats in tried.items()}

    @property
    def weights(self) -> int:
        """Numbers in all tensors."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def refuse(budget: Budget, account: Account, smallest: int) -> None:
    """Raise RondelError: the budget is below the fewest bytes."""
    if budget.bpw is not None:
        bits = math.ceil(8e3 * smallest / account.weights) / 1e3
        raise RondelError(f"{budget.option}: the smallest formats that this model fits take {bits:.3f} bits a weight")
    raise RondelError(f"{budget.option}: the smallest file that this model fits has {smallest} bytes")


def worth_trying(account: Account, tried: Mapping[str, tuple[str, ...]], allowed: int) -> dict[str, tuple[str, ...]]:
    """Without the formats far below the mean bits a weight, unless the budget asks for them."""
    bits = 8 * allowed / account.weights

    def kept(name: str, formats: tuple[str, ...]) -> tuple[str, ...]:
        least = LEAST_SHARE * bits / 8 * math.prod(account.shapes[name])
        return tuple(format for format in formats if account.tensor(name, format) >= least) or formats

    fewer = {name: kept(name, formats) for name, formats in tried.items()}
    return fewer if account.total(account.smallest(fewer)) <= allowed else dict(tried)
