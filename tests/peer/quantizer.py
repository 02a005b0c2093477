"""llama-quantize through llama.cpp's C interface: a float GGUF file and an importance matrix in, a quantized file out.

`llama_model_quantize` is the function behind the program, and llama-cpp-python's library has it. Prebuilt wheels leave
it out, but not ggml's encoders, which are all it computes: `ggml_quantize` writes the same file with them.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import gguf
import numpy as np

from tests.peer.ggml import ggml_encode
from tests.peer.llama import quiet

FIRST_VERSION = (0, 3, 36)  # of llama-cpp-python: older structs take the importance matrix in another form
BUFFER = 1024  # more than the struct of any version


class _ImatrixEntry(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.POINTER(ctypes.c_float)), ("size", ctypes.c_size_t))


class _QuantizeParameters(ctypes.Structure):
    """`struct llama_model_quantize_params`; what may be added at its end stays as the library's defaults return it."""

    _fields_ = (
        ("nthread", ctypes.c_int32),
        ("ftype", ctypes.c_int32),
        ("output_tensor_type", ctypes.c_int32),
        ("token_embedding_type", ctypes.c_int32),
        ("allow_requantize", ctypes.c_bool),
        ("quantize_output_tensor", ctypes.c_bool),
        ("only_copy", ctypes.c_bool),
        ("pure", ctypes.c_bool),
        ("keep_split", ctypes.c_bool),
        ("dry_run", ctypes.c_bool),
        ("imatrix", ctypes.POINTER(_ImatrixEntry)),
        ("rest", ctypes.c_uint8 * (BUFFER - 32)),
    )


@cache
def find_quantizer() -> Path | None:
    """The shared library with `llama_model_quantize`, or None: prebuilt wheels leave it out."""
    spec = importlib.util.find_spec("llama_cpp")
    places = spec.submodule_search_locations if spec else None
    found = [path for place in places or [] for path in sorted(Path(place).glob("lib/libllama.*"))]
    if not found:
        return None
    version = importlib.metadata.version("llama-cpp-python").split(".")
    return found[0] if tuple(int(part) for part in version[:3]) >= FIRST_VERSION else None


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(find_quantizer()))
    library.llama_model_quantize_default_params.restype = _QuantizeParameters
    library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_QuantizeParameters)]
    library.llama_model_quantize.restype = ctypes.c_uint32
    library.llama_log_set(quiet, None)
    return library


def _parameters() -> _QuantizeParameters:
    defaults: _QuantizeParameters = _library().llama_model_quantize_default_params()
    flags = [getattr(defaults, name) for name, kind in defaults._fields_ if kind is ctypes.c_bool]
    assert flags == [False, True, False, False, False, False], "this library's llama_model_quantize_params is another"
    assert not defaults.imatrix
    return defaults


def llama_quantize(
    source: Path, out: Path, file_type: int, imatrix: Mapping[str, np.ndarray] | None = None, threads: int = 1
) -> None:
    """Quantize a float GGUF file as `llama-quantize` does.

    `file_type` is a general.file_type; `imatrix` the mean squares (cols,) by tensor name.
    """
    parameters = _parameters()
    parameters.nthread, parameters.ftype = threads, file_type
    rows = {name: np.ascontiguousarray(values, np.float32) for name, values in (imatrix or {}).items()}
    pointer = ctypes.POINTER(ctypes.c_float)
    entries = [_ImatrixEntry(name.encode(), row.ctypes.data_as(pointer), row.size) for name, row in rows.items()]
    array = (_ImatrixEntry * (len(entries) + 1))(*entries)  # an entry without a name ends it
    if entries:
        parameters.imatrix = ctypes.cast(array, ctypes.POINTER(_ImatrixEntry))
    code = _library().llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters))
    assert code == 0, f"llama_model_quantize answers {code}"


def ggml_quantize(source: Path, out: Path, layout: Path, imatrix: Mapping[str, np.ndarray] | None = None) -> None:
    """Quantize a float GGUF file tensor by tensor with ggml's encoders, to the types that the file `layout` has."""
    floats = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    out.write_bytes(layout.read_bytes())
    for tensor in gguf.GGUFReader(out, "r+").tensors:
        weights = gguf.dequantize(floats[tensor.name].data, floats[tensor.name].tensor_type)
        if tensor.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            tensor.data[:] = weights.reshape(tensor.data.shape)
            continue
        row = (imatrix or {}).get(tensor.name)
        packed = ggml_encode(int(tensor.tensor_type), weights, row, tensor.data.nbytes)
        tensor.data[:] = packed.reshape(tensor.data.shape)
