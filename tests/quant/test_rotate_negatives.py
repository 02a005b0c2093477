"""Is every matrix, bias, gain and end that a rotation does not reach noticed, in every family and placement?

These are wrong models that must fail: an oracle that none of them disturbs shows nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.family import EMBEDDING, OUTPUT, OUTPUT_NORM, block_tensor
from rondel.converters.rotation import Rotation
from rondel.quant.hadamard import pack_signs, rotate_channels, unpack_signs
from rondel.quant.reference import reference_logits
from rondel.quant.rotate import RotateConfig
from rondel.quant.rotated_view import RotatedView
from rondel.quant.rotator import Rotator
from rondel.quant.workers import Workers
from tests.quant.sparse_reference import sparse_logits
from tests.quant.test_rotate import EXACT, MODELS, Patched, difference
from tests.quant.test_rotate_tensors import UNNORMED, model
from tests.tiny import SMALLEST_TOKENIZER
from tests.tiny_sparse import MODELS as SPARSE

# Of the largest logit. The least is one expert of a few (0.04); the right model's difference is 1e-10 at most.
NOTICED = 0.02
TOKENS = torch.randint(0, SMALLEST_TOKENIZER, (24,), generator=torch.Generator().manual_seed(5))
ALL = RotateConfig(hidden="full", seed=3, target="rondel")
Wrong = tuple[str, dict[str, torch.Tensor]]


def logits(of: Checkpoint) -> torch.Tensor:
    return sparse_logits(of, TOKENS)[0] if of.numbers.experts else reference_logits(of, TOKENS)


def roles_left_out(source: Checkpoint, right: dict[str, torch.Tensor], rotations: list[Rotation]) -> Iterator[Wrong]:
    """Every role that a rotation turns, as it would be had that rotation not reached it: weights, biases, the ends."""
    layers = range(source.numbers.layers)
    places = {EMBEDDING: [EMBEDDING], OUTPUT: [OUTPUT]}
    for linear in source.family.linears:
        for kind in ("weight", "bias"):
            names = [name for layer in layers for name in linear.tensors(layer, source.numbers, kind)]
            places[f"{linear.role}.{kind}"] = [name for name in names if name in right]
    for missed in rotations:
        left = [rotation for rotation in rotations if rotation is not missed]
        with Workers(1) as workers:
            rotator = Rotator(source, left, workers, dtype=torch.float64)
            for role, names in places.items():
                wrong = {name: rotator.tensor(name) for name in names}
                if any(not torch.equal(wrong[name], right[name]) for name in names):
                    yield f"{missed.site} does not reach {role}", wrong


class Unfolded(Rotator):
    """Turns matrices without the gains in front of them."""

    def gain(self, name: str) -> torch.Tensor:
        return torch.ones(self.source.info(name).shape, dtype=torch.float64)


def gains_left_in(source: Checkpoint, right: dict[str, torch.Tensor], rotations: list[Rotation]) -> Iterator[Wrong]:
    """Norms that keep their gain: although it was folded, and in place of folding it."""
    layers = range(source.numbers.layers)
    norms = {norm: [block_tensor(layer, norm.role) for layer in layers] for norm in source.family.norms}
    folded = {norm.role: (names, norm.makes) for norm, names in norms.items()} | {"output_norm": ([OUTPUT_NORM], None)}
    with Workers(1) as workers:
        rotator = Unfolded(source, rotations, workers, dtype=torch.float64)
        for role, (names, site) in folded.items():
            gains = {name: source.read_float(name, torch.float64) for name in names if name in rotator.folded}
            if not gains:
                continue
            yield f"{role} keeps its gain", gains
            readers = [linear for linear in source.family.linears if linear.reads == site]
            behind = [name for layer in layers for one in readers for name in one.tensors(layer, source.numbers)]
            yield f"{role} is not folded", gains | {name: rotator.tensor(name) for name in behind or [OUTPUT]}


def one_expert(source: Checkpoint) -> Iterator[Wrong]:
    """A single expert, one that the last token goes to, that was forgotten."""
    if source.numbers.experts:
        used = int(sparse_logits(source, TOKENS)[1][-1, -1, 0])
        for role in ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"):
            name = block_tensor(source.numbers.layers - 1, f"{role}.{used}")
            yield f"{name} was forgotten", {name: source.read_float(name, torch.float64)}


def in_turn(source: Checkpoint, rotations: list[Rotation]) -> Iterator[Wrong]:
    """Query heads paired with the value heads in turn (h mod kv_heads) and not in groups."""
    numbers = source.numbers
    group = numbers.heads // numbers.kv_heads
    if group == 1 or numbers.kv_heads == 1:
        return
    heads = next(rotation for rotation in rotations if rotation.site == "heads")
    signs = unpack_signs(heads.signs, heads.size).reshape(numbers.heads, -1)
    wrong = replace(heads, signs=pack_signs(signs[::group].repeat(group, 1).flatten()))
    with Workers(1) as workers:
        paired = [wrong if rotation is heads else rotation for rotation in rotations]
        rotator = Rotator(source, paired, workers, dtype=torch.float64)
        names = [block_tensor(layer, "attn_output") for layer in range(numbers.layers)]
        yield "query heads in turn", {name: rotator.tensor(name) for name in names}


def centred(source: Checkpoint, right: dict[str, torch.Tensor], stream: Rotation) -> Iterator[Wrong]:
    """An embedding without the mean of each row, which some tools take away as for LayerNorm."""
    mean = source.read_float(EMBEDDING, torch.float64).mean(1, keepdim=True)
    yield (
        "the embedding is centred",
        {EMBEDDING: right[EMBEDDING] - rotate_channels(mean.expand(right[EMBEDDING].shape), stream)},
    )


@pytest.mark.parametrize("name", [*MODELS, *SPARSE])
def test_whatever_a_rotation_misses_is_noticed(name: str, tmp_path: Path) -> None:
    source = model(name, tmp_path)
    view = RotatedView(source, replace(ALL, rope_pairs=name in UNNORMED))
    right, expected = {tensor: view.read(tensor) for tensor in view.names()}, logits(source)
    assert difference(logits(Patched(view, right)), expected) < EXACT
    rotations, seen = view.read_rotations(), []
    for what, wrong in itertools.chain(
        roles_left_out(source, right, rotations),
        gains_left_in(source, right, rotations),
        one_expert(source),
        in_turn(source, rotations),
        centred(source, right, rotations[0]),
    ):
        assert difference(logits(Patched(view, right | wrong)), expected) > NOTICED, what
        seen.append(what)
    assert ("query heads in turn" in seen) == (1 < source.numbers.kv_heads < source.numbers.heads)
    assert all(any(what.startswith(f"{rotation.site} does") for what in seen) for rotation in rotations)
