"""The two ways to llama-quantize's file give the same bytes, and the importance matrix arrives in both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rondel.converters.checkpoint import open_checkpoint
from rondel.converters.export import ExportConfig, export
from rondel.converters.metadata import file_type
from tests.peer.llama import find_library
from tests.peer.quantizer import find_quantizer, ggml_quantize, llama_quantize
from tests.tiny import tiny_model

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(find_library() is None, reason="unmodified llama.cpp is not installed (make install-peer)"),
    pytest.mark.skipif(find_quantizer() is None, reason="needs llama_model_quantize: pip install llama-cpp-python"),
]


@pytest.mark.parametrize("mixture", ["Q2_K", "Q4_K_S", "IQ4_XS"])
def test_ggml_s_encoders_make_llama_quantize_s_file(mixture: str, tmp_path: Path) -> None:
    source = open_checkpoint(tiny_model("llama", tmp_path / "hf", width=256, hidden=256, heads=4))
    (floats,) = export(source, tmp_path / "f32.gguf", ExportConfig(type="F32"))
    names = [name for names in source.shards().values() for name in names if source.info(name).shape[1:] == (256,)]
    imatrix = {name: np.random.default_rng(0).exponential(size=256) for name in names}
    number = file_type(mixture)
    assert number is not None
    theirs, same, unweighted = (tmp_path / f"{name}.gguf" for name in ("theirs", "same", "unweighted"))
    llama_quantize(floats, theirs, number, imatrix)
    ggml_quantize(floats, same, theirs, imatrix)
    assert same.read_bytes() == theirs.read_bytes()
    ggml_quantize(floats, unweighted, theirs)
    assert unweighted.read_bytes() != theirs.read_bytes()
