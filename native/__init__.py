"""The runtime, bound: `Model`, `Session`, `Sampler`, `File`, and the block formats' encoders and decoders."""

from rondel.native.file import File, Tensor
from rondel.native.library import NativeError
from rondel.native.model import (
    Model,
    Sampler,
    Session,
    cpu_count,
    instruction_set,
    instruction_sets,
    read_bandwidth,
    use_instruction_set,
)

__all__ = [
    "File",
    "Model",
    "NativeError",
    "Sampler",
    "Session",
    "Tensor",
    "cpu_count",
    "instruction_set",
    "instruction_sets",
    "read_bandwidth",
    "use_instruction_set",
]
