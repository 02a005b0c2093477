"""Does the reference forward pass compute what transformers computes?"""

from __future__ import annotations

import pytest
import torch

from rondel.converters.checkpoint import open_checkpoint
from rondel.quant.reference import reference_logits
from tests.tiny import FAMILIES, tiny_model

# transformers' norms and RoPE tables are float32 whatever the model's precision.
FLOAT32_NORMS = 1e-5
TOKENS = torch.randint(0, 288, (40,), generator=torch.Generator().manual_seed(5))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize(
    ("family", "more"),
    [*((family, {}) for family in FAMILIES), ("qwen3", {"tied": True}), ("llama", {"attention_bias": True}),
     ("llama", {"rope_parameters": LLAMA3}),
     ("llama", {"rope_parameters": LINEAR, "heads": 6, "width": 96, "head_dim": 24})],
)  # fmt: skip
def test_logits_are_those_of_transformers(family, more, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tiny_model(family, tmp_path / "model", **more)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double().eval()
    with torch.no_grad():
        expected = model(TOKENS[None]).logits[0]
    got = reference_logits(open_checkpoint(folder), TOKENS)
    assert (got - expected).abs().max() < FLOAT32_NORMS * expected.abs().max()
