"""Files of target llama.cpp in unmodified llama.cpp: they load, and say the same as in rondel's own runtime."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from ggml import has_avx2_order
from llama import Llama, find_library

from rondel.converters.checkpoint import open_checkpoint
from rondel.converters.export import ExportConfig, export
from rondel.converters.stats import Stats
from rondel.native import Model, Session
from rondel.quant.calibrate import CalibrateConfig, calibrate
from rondel.quant.perplexity import perplexity, windows
from rondel.quant.quantize import QuantizeConfig, quantize

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(find_library() is None, reason="unmodified llama.cpp is not installed (make install-peer)"),
]

ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "tests" / "models" / "stories-4m"
CALIBRATION = ROOT / "tests" / "models" / "stories.txt"
CONTEXT = 256
PERPLEXITY_TOLERANCE = 0.005  # relative: its products of many tokens at once add in another order than of one
GREEDY_TOKENS = 64
PROMPTS = (
    "Once upon a time",
    "The little dog",
    "Tom and Lily went to the park. They",
    "One day, a girl named",
    "There was a big",
    "Ben liked to",
    "The sun was",
    "Mia saw a",
    "In the forest",
    "A boy and his",
)
# Activations are rounded to int8 in both programs; where the last bit of a float tips one of these roundings, logits
# move by up to one percent of the largest. So one text from one file takes the same bits, and rondel computes those of
# llama.cpp's AVX2 kernels. Its builds for other processors part from that one too: of these ten texts, an AVX-512 build
# wrote 10, 9, 9 and 10 (F16, Q8_0, Q4_K, Q2_K) alike. There a text may part where two tokens are nearly tied.
NEARLY_TIED = 0.015  # of the largest logit
EQUAL_TEXTS = {"F16": 10, "Q8_0": 6, "Q4_K": 6, "Q2_K": 6}  # of ten, at least, in those other builds
SAME_BITS_TOKENS = 256  # llama.cpp's sums over more positions depend on its number of threads
PEER_THREADS = 1  # its threads wait for each other without sleeping: two may take a hundred times longer on busy cores


@pytest.fixture(scope="session")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> Stats:
    out = tmp_path_factory.mktemp("stats") / "calib"
    config = CalibrateConfig(tokens=4096, context=CONTEXT)
    return calibrate(open_checkpoint(DEMO), out, config, text=[CALIBRATION])


@pytest.fixture(scope="session", params=["F16", "Q8_0", "Q4_K", "Q2_K"])
def gguf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, statistics: Stats) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    source = open_checkpoint(DEMO)
    if request.param == "F16":
        (path,) = export(source, folder / "model.gguf", ExportConfig(type="F16"))
    else:
        packed = quantize(source, folder / "quantized", QuantizeConfig(type=request.param), statistics)
        (path,) = export(packed, folder / "model.gguf", ExportConfig())
    return path


def rondel_greedy(model: Model, prompt: list[int], count: int) -> list[int]:
    session = Session(model, context=len(prompt) + count, threads=2)
    answer = [int(session.eval(prompt)[-1].argmax())]
    while len(answer) < count:
        answer.append(int(session.eval(answer[-1:])[-1].argmax()))
    return answer


def rondel_nll(model: Model, tokens: list[int]) -> float:
    session = Session(model, context=CONTEXT, threads=2)
    keys = model.file.keys
    begin = keys.get("tokenizer.ggml.bos_token_id") if keys.get("tokenizer.ggml.add_bos_token") else None
    told = perplexity(
        windows(tokens, CONTEXT),
        lambda window, first: session.eval(window, position=0, all=True)[first:],
        begin=begin,
    )
    return float(told["nll"])


def test_greedy_text_is_the_same(gguf: Path, request: pytest.FixtureRequest) -> None:
    model = Model(gguf)
    equal = 0
    wanted = len(PROMPTS) if has_avx2_order() else EQUAL_TEXTS[request.node.callspec.params["gguf"]]
    with Llama(gguf, context=CONTEXT, threads=PEER_THREADS) as peer:
        for text in PROMPTS:
            prompt = peer.tokenize(text)
            ours, theirs = rondel_greedy(model, prompt, GREEDY_TOKENS), peer.greedy(prompt, GREEDY_TOKENS)
            equal += ours == theirs
            if ours != theirs:
                place = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
                logits = Session(model, context=CONTEXT).eval(prompt + ours[:place])[-1]
                gap = abs(logits[ours[place]] - logits[theirs[place]])
                assert gap < NEARLY_TIED * np.abs(logits).max(), f"{text!r} parts at token {place} without a near tie"
    assert equal >= wanted


def test_logits_are_the_same_bits(gguf: Path) -> None:
    if not has_avx2_order():
        pytest.skip("this build of llama.cpp adds floats in another order than its AVX2 build")
    session = Session(Model(gguf), context=SAME_BITS_TOKENS, threads=2)
    with Llama(gguf, context=SAME_BITS_TOKENS, threads=PEER_THREADS) as peer:
        tokens = peer.tokenize(CALIBRATION.read_text(encoding="utf-8")[:4096])[:SAME_BITS_TOKENS]
        theirs = np.concatenate([peer.eval([token], position) for position, token in enumerate(tokens)])
    ours = session.eval(tokens, all=True)
    assert len(theirs) == SAME_BITS_TOKENS
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def test_perplexity_is_the_same(gguf: Path) -> None:
    text = CALIBRATION.read_text(encoding="utf-8")
    with Llama(gguf, context=CONTEXT, threads=PEER_THREADS) as peer:
        tokens = peer.tokenize(text)[: 12 * CONTEXT]
        theirs, count = peer.nll(tokens, CONTEXT)
    assert count > 1000
    assert np.exp(abs(rondel_nll(Model(gguf), tokens) - theirs)) - 1 < PERPLEXITY_TOLERANCE
