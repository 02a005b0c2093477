"""Encoders against ggml's on the weights of a trained model, under an importance as uneven as activations are."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from rondel.converters.huggingface import open_huggingface
from rondel.native.formats import decode, encode, formats
from tests.peer.ggml import ggml_encode
from tests.peer.llama import find_library

MODEL = Path(__file__).parent.parent / "models" / "stories-4m"
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q8_0")
NOT_ABOVE = 1.0  # of ggml's error
# Our scales are unbiased: that adds the share e to a squared error e, here about 2 %, as much as Q3_K's search gains.
UNBIASED_Q3_K = 1.005


@cache
def matrices() -> list[tuple[np.ndarray, np.ndarray]]:
    source, random = open_huggingface(MODEL), np.random.default_rng(3)
    names = [f"blk.1.{name}.weight" for name in ("attn_q", "attn_output", "ffn_up", "ffn_down")]
    weights = [source.read_float(name).numpy()[:96] for name in names]
    return [(w, np.exp(random.standard_normal(w.shape[1])).astype(np.float32)) for w in weights]


def relative_error(weights: np.ndarray, decoded: np.ndarray, importance: np.ndarray) -> float:
    lost = np.square(weights.astype(np.float64) - decoded).sum(0) @ importance
    return float(lost / (np.square(weights, dtype=np.float64).sum(0) @ importance))


@pytest.mark.peer
@pytest.mark.skipif(find_library() is None, reason="no llama.cpp here: install the extra `peer`")
@pytest.mark.parametrize("name", TYPES)
def test_error_on_a_trained_model_is_not_above_that_of_ggml(name: str) -> None:
    mine = other = 0.0
    for weights, importance in matrices():
        ours = encode(name, weights, importance)
        theirs = ggml_encode(formats()[name].ggml_type, weights, importance, ours.size)
        mine += relative_error(weights, decode(name, ours, *weights.shape), importance)
        other += relative_error(weights, decode(name, theirs, *weights.shape), importance)
    assert mine <= (UNBIASED_Q3_K if name == "Q3_K" else NOT_ABOVE) * other
