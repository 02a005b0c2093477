"""The numbers and block sizes of ggml's types: the gguf package's, and those that it does not list yet."""

from __future__ import annotations

from dataclasses import dataclass

import gguf


@dataclass(frozen=True)
class GgmlType:
    """One tensor type of GGUF files: its number, and the columns and bytes of a block."""

    number: int
    block: int
    bytes: int


GGML_TYPES = {"Q1_0": GgmlType(41, 128, 18), "Q2_0": GgmlType(42, 64, 18)}
GGML_TYPES |= {kind.name: GgmlType(int(kind), *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}

# general.file_type of the types whose number the gguf package may lack, and of a plain MXFP4 file.
FILE_TYPES = {"Q1_0": 40, "Q2_0": 41, "MXFP4": 38}
