"""The method gptq: matrices are rounded site after site with error feedback, and text held out decides on each.

A model runs on the calibration text behind its already rounded matrices. Where feedback does not lower the error of a
matrix's outputs on the windows held out, the codes of plain rounding are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from rondel.converters.checkpoint import Checkpoint
from rondel.converters.family import EMBEDDING, block_tensor
from rondel.converters.folder import read_tensor
from rondel.converters.output import StageOutput
from rondel.converters.stats import OUTPUT_IN
from rondel.native.formats import Bytes, Floats, decode, encode, feeds_back
from rondel.quant.contest import Contest
from rondel.quant.factorization import Factor, factorize
from rondel.quant.feedback import drawn_target, feed_back
from rondel.quant.importance import Means
from rondel.quant.rounding import (
    Rounded,
    float_rows,
    naming,
    round_matrix,
    row_pieces,
)
from rondel.quant.sequential import FEWEST_WINDOWS, FLOAT, QUANTIZED, Moments, SequentialRun
from rondel.quant.workers import Workers

TOKENS_PER_CHANNEL = 20  # of a tied head: enough for its moments, and passing all the text twice takes long
HIDDEN_STATES = (QUANTIZED, FLOAT)  # what lies in the output's folder while the stage runs

Starting = Callable[[Sequence[str]], None]  # hears the names of the matrices that are rounded next


@dataclass(frozen=True)
class Request:
    """What to round and how: formats by tensor name, how much columns count, and the text (windows, context)."""

    source: Checkpoint
    formats: Mapping[str, str]
    means: Callable[[str], Means | None]
    windows: torch.Tensor
    sequential: bool = True
    asymmetric: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class _Learnt:
    """What feedback needs of a site."""

    factor: Factor
    drift: torch.Tensor | None  # of `drawn_target`


class FeedbackRounding:
    """Rounds the shards of a model in their order, and goes on where an interrupted run stopped.

    `output` is where the caller writes them: those that are written are read back to stand behind them again.
    """

    def __init__(self, request: Request, output: StageOutput, workers: Workers, starting: Starting) -> None:
        self._request = request
        self._source = request.source
        self._output = output
        self._workers = workers
        self._starting = starting
        self._run: SequentialRun | None = None

    def round(self, shard: str, names: Sequence[str]) -> dict[str, Rounded]:
        """Round the matrices of one shard, which is the next one that is not written."""
        if shard.startswith("blk-"):
            return self._block(int(shard.removeprefix("blk-")))
        found: dict[str, Rounded] = {}
        for name in names:
            self._starting([name])
            if name != self._source.head() or not feeds_back(self._request.formats[name]):
                found[name] = self._plain(name)
            elif name == EMBEDDING:
                run = self._float_run()
                found |= self._compete(run, OUTPUT_IN, [name])
                run.remove()
            else:
                found |= self._compete(self._reach(self._source.numbers.layers), OUTPUT_IN, [name])
        return found

    def remove(self) -> None:
        """Delete the hidden states."""
        if self._run is not None:
            self._run.remove()

    def _plain(self, name: str) -> Rounded:
        request = self._request
        weights, threads = self._source.read(name), self._workers.threads
        return round_matrix(name, weights, request.formats[name], request.means(name), threads)

    def _block(self, layer: int) -> dict[str, Rounded]:
        run, found = self._reach(layer), dict[str, Rounded]()
        for site in self._source.family.sites:
            linears = {block_tensor(layer, linear.role): linear for linear in self._source.family.readers(site)}
            self._starting(list(linears))
            competing = [name for name in linears if feeds_back(self._request.formats[name])]
            made = {name: self._plain(name) for name in linears if name not in competing}
            made |= self._compete(run, site, competing) if competing else {}
            for name, linear in linears.items():
                run.replace(linear, self._decoded(name, made[name].packed))
            found |= made
        run.leave()
        return found

    # ---- one site ----

    def _compete(self, run: SequentialRun, site: str, names: Sequence[str]) -> dict[str, Rounded]:
        """Round the readers of a site both ways; each keeps the codes that miss less of the text held out."""
        request, learnt = self._request, None
        contests = {
            name: Contest(name, request.formats[name], request.means(name), looked_up=name == EMBEDDING)
            for name in names
        }
        for rows in self._row_ranges(site, names[0]):
            values = {name: float_rows(self._source.read(name), rows) for name in names}
            # Plain codes come first: they refuse weights that are not finite by name, before activations overflow.
            plain = {name: self._encode(contests[name], rows.start or 0, values[name]) for name in names}
            learnt = learnt or self._learn(run, site, contests)
            matrices = {
                name: contests[name].add(
                    values[name], plain[name], self._feed_back(contests[name], values[name], learnt)
                )
                for name in names
            }
            for name, judged in run.judge(site, matrices).items():
                contest = contests[name]
                contest.whole.outputs += judged.wanted
                contest.plain.outputs += judged.missed[0]
                contest.fed_back.outputs += judged.missed[1]
        return {name: contest.decide() for name, contest in contests.items()}

    def _row_ranges(self, site: str, name: str) -> Iterator[slice]:
        """All rows at once inside a block; a head is too large for that."""
        if site != OUTPUT_IN:
            return iter([slice(None)])
        return row_pieces(*self._source.info(name).shape)

    def _encode(self, contest: Contest, first: int, values: Floats) -> Bytes:
        with naming(contest.name, first):
            return encode(contest.format, values, contest.importance, threads=self._workers.threads)

    def _learn(self, run: SequentialRun, site: str, contests: Mapping[str, Contest]) -> _Learnt:
        moments = run.moments(site)
        for contest in contests.values():
            if contest.looked_up:
                moments = self._with_lookups(contest.name, moments)
        # In place: at the largest site of a model each of these is larger than a block's weights.
        second, cross = moments.second, moments.cross
        drift = None if cross is None else cross.sub_(second).to(torch.float32)
        del moments, cross
        return _Learnt(factorize(second, device=self._request.device), drift)

    def _with_lookups(self, name: str, moments: Moments) -> Moments:
        """The metric of a matrix that is head and embedding in one: the relative errors of both uses, added."""
        weights = self._source.read(name)
        outputs, squares = 0.0, 0.0
        metric = moments.second.to("cpu", torch.float32)
        for rows in row_pieces(*weights.shape):
            values = weights[rows].to(torch.float32)
            outputs += float(((values @ metric) * values).sum(dtype=torch.float64))
            squares += float(values.square().sum(dtype=torch.float64))
        if not (outputs > 0 and squares > 0):
            return moments
        both = moments.second.div_(outputs)
        both.diagonal().add_(1 / squares)
        return Moments(both, None)

    def _feed_back(self, contest: Contest, values: Floats, learnt: _Learnt) -> Bytes:
        weights = torch.from_numpy(values)
        target = None if learnt.drift is None else drawn_target(weights, learnt.factor, learnt.drift)
        with naming(contest.name):
            return feed_back(weights, learnt.factor, contest.format, self._workers, target=target)

    # ---- where the model stands ----

    def _float_run(self) -> SequentialRun:
        """The float model behind its last layer: what a head sees that is rounded before the layers."""
        request = self._request
        enough = -(-TOKENS_PER_CHANNEL * self._source.numbers.width // request.windows.shape[1])
        run = SequentialRun(
            self._source,
            request.windows[: max(enough, FEWEST_WINDOWS)],
            self._output.partial,
            self._workers,
            sequential=False,
            device=request.device,
        )
        run.begin()
        for _ in range(self._source.numbers.layers):
            run.enter()
            run.leave()
        run.enter()
        return run

    def _reach(self, layer: int) -> SequentialRun:
        """The run in front of a layer, through what is rounded and written already."""
        request, run = self._request, self._run
        if run is None:
            run = self._run = SequentialRun(
                self._source,
                request.windows,
                self._output.partial,
                self._workers,
                sequential=request.sequential,
                asymmetric=request.asymmetric,
                device=request.device,
            )
            if layer and run.kept(layer):
                run.resume(layer)
            else:
                run.begin(self._rounded_embedding())
        while run.layer < layer:
            run.enter()
            for linear in self._source.family.linears:
                name = block_tensor(run.layer, linear.role)
                run.replace(linear, self._written(name, f"blk-{run.layer:05d}", slice(None)))
            run.leave()
        run.enter()
        return run

    def _rounded_embedding(self) -> Iterator[tuple[slice, torch.Tensor]]:
        for rows in row_pieces(*self._source.info(EMBEDDING).shape):
            yield rows, self._written(EMBEDDING, "embedding", rows)

    def _written(self, name: str, shard: str, rows: slice) -> torch.Tensor:
        """Some rows of a matrix as it was written, F32."""
        data = read_tensor(self._output.partial / f"{shard}.safetensors", name)
        if data.dtype.is_floating_point:
            return data[rows].to(torch.float32)
        return self._decoded(name, data.numpy(), rows)

    def _decoded(self, name: str, packed: Bytes, rows: slice = slice(None)) -> torch.Tensor:
        count, cols = self._source.info(name).shape
        first, last, _ = rows.indices(count)
        size = len(packed) // count
        part = packed[first * size : last * size]
        return torch.from_numpy(decode(self._request.formats[name], part, last - first, cols))
