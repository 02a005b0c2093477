"""The runtime, bound: `Model`, `Session`, `Sampler`, `File`, and the block formats' encoders and decoders."""

from typing import TYPE_CHECKING, Any

from rondel.native.file import File, Tensor
from rondel.native.library import NativeError
from rondel.native.machine import cpu_count, instruction_set, instruction_sets, read_bandwidth, use_instruction_set
from rondel.native.model import Model, Sampler, Session

if TYPE_CHECKING:
    from rondel.native.formats import decode, encode, matmul

__all__ = [
    "File",
    "Model",
    "NativeError",
    "Sampler",
    "Session",
    "Tensor",
    "cpu_count",
    "decode",
    "encode",
    "instruction_set",
    "instruction_sets",
    "matmul",
    "read_bandwidth",
    "use_instruction_set",
]


def __getattr__(name: str) -> Any:
    """Load the formats on first use: running a model does not need them."""
    if name in {"decode", "encode", "matmul"}:
        from rondel.native import formats

        return getattr(formats, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
