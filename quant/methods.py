"""The named methods of quantize: an optional rescaling of the model, and how the matrices are rounded after it."""

from __future__ import annotations

from dataclasses import dataclass

from rondel.converters.errors import RondelError

# rtn: every column counts the same; imatrix: columns count by their statistics; gptq: with error feedback as well.
ROUNDINGS = ("rtn", "imatrix", "gptq")
# awq, smoothquant: channels are rescaled before, so that what counts most is rounded finest.
RESCALINGS = ("awq", "smoothquant")


AUTO = "auto"  # tries the others on some layers and takes the best


@dataclass(frozen=True)
class Method:
    """`rounding` is one of ROUNDINGS (or AUTO, until it has chosen), `rescaling` one of RESCALINGS or None."""

    rounding: str
    rescaling: str | None = None

    @property
    def name(self) -> str:
        """How the method is written: "gptq", "awq+gptq"."""
        return self.rounding if self.rescaling is None else f"{self.rescaling}+{self.rounding}"

    @property
    def weighted(self) -> bool:
        """Whether the statistics say how much a column counts."""
        return self.rounding != "rtn"

    @property
    def feeds_back(self) -> bool:
        """Whether what rounding a column misses is taken out of the columns behind it."""
        return self.rounding == "gptq"


def method_named(text: str) -> Method:
    """The method of a name; a rescaling alone is followed by imatrix. Raises RondelError for unknown names."""
    if text.strip().lower() == AUTO:
        return Method(AUTO)
    rescaling, plus, rounding = text.strip().lower().rpartition("+")
    if not plus and rounding in RESCALINGS:
        rescaling, rounding = rounding, "imatrix"
    if rounding not in ROUNDINGS or (rescaling not in RESCALINGS if rescaling or plus else False):
        prefixes = f", also behind {' or '.join(f'{name}+' for name in RESCALINGS)}" if RESCALINGS else ""
        raise RondelError(f"--method {text}: expected one of {', '.join(ROUNDINGS)}{prefixes}; or {AUTO}")
    return Method(rounding, rescaling or None)
