"""Owns the fit of copies: gates and output gains by ridge, then block distillation, then KL on the teacher's logits.

Pass 0 stays as it is. Where the teacher's residual stream compares with the student's (alignment.py), it is a target
too; other teachers teach by their logits alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from numpy.typing import NDArray

from rondel.converters.progress import Progress, silent
from rondel.converters.replication import ATTENTION, FFN, Replication, Step
from rondel.converters.replication_kinds import KINDS, kind_size
from rondel.quant.alignment import Alignment, align
from rondel.quant.descent import Leaf, batches, descend, divergence, open_workers
from rondel.quant.student import MEAN, Student, Values, Weights, check_teacher
from rondel.quant.workers import Workers

STEPS = 150
BATCH = 4  # windows a step
GATE_RATE, GAIN_RATE = 2e-2, 5e-3  # Adam's
RIDGE_WINDOWS = 16  # whose tokens the closed form sees
RIDGE = 1e-3  # of a branch's energy
CHANNEL_RIDGE = 0.1  # draws a channel's own gain to the gate that all channels share
LARGEST_GATE = 2.0  # of the closed form, which is linear in what the model is not
SMALLEST_GATE = 0.02  # below it, gains of single channels would be noise divided by nothing

FITTED = (
    "gate_attn",
    "gate_ffn",
    "attn_norm_gain",
    "ffn_norm_gain",
    "attn_out_gain",
    "ffn_out_gain",
    "attn_out_bias",
    "ffn_out_bias",
    "q_head_gain",
    "ffn_hidden_gain",
)
DEFAULTS = (("steps", STEPS), ("seed", 0), ("batch", BATCH))

Sets = list[dict[str, torch.Tensor]]
Known = tuple[torch.Tensor, dict[int, torch.Tensor], torch.Tensor]


def _set_of(found: Replication, step: Step) -> int:
    """The number of the parameter set that a copy is fitted by; 0 for the base pass."""
    inherited = found.layer_sets[step.layer] if found.layer_sets else 0
    return (step.parameters or inherited) if step.number else 0


def opening_sets(
    student: Student,
    found: Replication,
    parameters: Sequence[Mapping[str, torch.Tensor | NDArray[Any]]] | None = None,
) -> Sets:
    """What a fit starts from: gates as given, else closed (open in a mean), and every gain that may be fitted as one.

    A parallel copy that reads its layer's keys keeps its attention norm as well.
    """
    given = parameters if parameters is not None else found.sets
    sets = [{kind: torch.as_tensor(v).float().clone() for kind, v in one.items()} for one in given]
    filled: dict[int, int] = {}
    for step in found.steps:
        index = _set_of(found, step)
        own_keys = filled.setdefault(step.slot, -1) != step.group
        filled[step.slot] = step.group
        if not index:
            continue
        values, closed = sets[index - 1], parameters is None and found.merges[step.group] != MEAN
        for part, name in ((ATTENTION, "attn"), (FFN, "ffn")):
            if not step.parts & part:
                continue
            if closed:
                values[f"gate_{name}"] = torch.zeros(1)
            for kind in (f"{name}_norm_gain", f"{name}_out_gain"):
                if own_keys or kind != "attn_norm_gain":
                    values.setdefault(kind, torch.full((kind_size(kind, student.numbers),), KINDS[kind].identity))
    return [{kind: values.to(student.device, student.dtype) for kind, values in one.items()} for one in sets]


class Distillation:
    """A fit under way, with what no step changes: what both models compute of the windows around the fitted layers.

    `found` and `sets` are the student's path, `weights` what stands in the place of its tensors at the moment.
    """

    def __init__(
        self,
        student: Student,
        teacher: Student,
        windows: torch.Tensor,
        found: Replication,
        layers: Iterable[int],
        *,
        sets: Sequence[Values] | None = None,
        weights: Callable[[], Weights | None] = lambda: None,
    ) -> None:
        self.student, self.teacher, self.windows = student, teacher, windows
        self.found, self.sets, self.weights = found, sets, weights
        self.spans = {  # first and last group of each fitted layer
            layer: (min(groups), max(groups))
            for layer in sorted(layers)
            if (groups := [step.group for step in found.steps if step.layer == layer])
        }
        self.first = min(first for first, _ in self.spans.values())
        self.last = max(last for _, last in self.spans.values())
        self.aligned: Alignment | None = align(student, teacher, windows)
        self._known: dict[int, Known] = {}
        self._spread: dict[int, torch.Tensor] = {}

    def known(self, window: int) -> Known:
        """The student's stream before the fitted layers, the teacher's behind each of them, and at its end."""
        if window not in self._known:
            with torch.no_grad():
                tokens = self.windows[window][None]
                before = self.student.embed(tokens)
                if self.first > 0:
                    before = self.through(before, 0, self.first - 1)[-1]
                if self.aligned:
                    streams, end = self.aligned.streams(tokens)
                    targets = {layer: streams[layer + 1] for layer in self.spans}
                else:
                    targets, end = {}, self.teacher.run(self.teacher.embed(tokens))
                self._known[window] = before, targets, end
        return self._known[window]

    def through(self, x: torch.Tensor, first: int, last: int | None) -> list[torch.Tensor]:
        """The stream after each group of the student from `first` to `last`."""
        groups = self.student.groups(x, self.found, self.sets, self.weights(), first=first, last=last)
        return [x for _, x in groups]

    def descend(  # noqa: PLR0917 (how many steps of what, and who works and listens)
        self,
        leaves: Sequence[Leaf],
        steps: int,
        batch: int,
        seed: int,
        workers: Workers,
        progress: Progress = silent,
    ) -> None:
        """Adam on the streams behind the fitted layers for half the steps, where they compare, then on the logits."""
        on_blocks = steps // 2 if self.aligned else 0
        count = len(self.windows)

        def after(step: int, _: float) -> bool:
            progress(step + 1, steps, "fitting the copies")
            return True

        descend(leaves, self.block_loss, batches(count, on_blocks, batch, seed), workers, after)
        plan = batches(count, steps - on_blocks, batch, seed + 1)
        descend(leaves, self.logit_loss, plan, workers, lambda step, loss: after(on_blocks + step, loss))

    def block_loss(self, window: int) -> torch.Tensor:
        """How far the streams behind the copied layers are from the teacher's, in its spread of each channel."""
        x, targets, _ = self.known(window)
        after = self.through(x, self.first, self.last)
        errors = [
            ((after[last - self.first] - targets[layer]) / self.spread(layer)).square().mean()
            for layer, (_, last) in self.spans.items()
        ]
        return torch.stack(errors).mean()

    def logit_loss(self, window: int) -> torch.Tensor:
        """KL from the teacher's distribution, mean over positions, in nats."""
        x, _, end = self.known(window)
        return divergence(self.student.head(self.through(x, self.first, None)[-1]), self.teacher.head(end))

    def spread(self, layer: int) -> torch.Tensor:
        """The teacher's standard deviation of each channel behind a layer, on the first window."""
        if layer not in self._spread:
            self._spread[layer] = self.known(0)[1][layer][0].std(0).clamp_min(1e-6)
        return self._spread[layer]


def _ridge(fit: Distillation, sets: Sets, layer: int, windows: range, workers: Workers) -> None:
    """Set the gates and output gains of a layer's copies by least squares on what is missing behind the layer."""
    first, last = fit.spans[layer]
    numbers = sorted({index for step in fit.found.steps if step.layer == layer and (index := _set_of(fit.found, step))})
    gates = [(sets[number - 1], part) for number in numbers for part in ("attn", "ffn")]
    gates = [(values, part) for values, part in gates if f"gate_{part}" in values]

    def moments(window: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over tokens: (width, gates, gates) of the branches, (width, gates) of branches and what is missing."""
        before, targets, _ = fit.known(window)
        with torch.no_grad():
            x = before if first == fit.first else fit.through(before, fit.first, first - 1)[-1]
            now = fit.through(x, first, last)[-1]
            branches = []
            for values, part in gates:
                changed = [{**one, f"gate_{part}": one[f"gate_{part}"] + 1} if one is values else one for one in sets]
                groups = fit.student.groups(x, fit.found, changed, first=first, last=last)
                branches.append([after for _, after in groups][-1] - now)
            u = (torch.stack(branches, -1)[0] / fit.spread(layer)[:, None]).double()
            r = ((targets[layer] - now)[0] / fit.spread(layer)).double()
            return torch.einsum("tjp,tjq->jpq", u, u), torch.einsum("tjp,tj->jp", u, r)

    parts = list(workers.map(moments, windows))
    square, cross = sum(a for a, _ in parts), sum(b for _, b in parts)
    assert isinstance(square, torch.Tensor)
    assert isinstance(cross, torch.Tensor)
    total = square.sum(0)
    eye = torch.eye(len(gates), dtype=total.dtype, device=total.device)
    shared = torch.linalg.solve(total + RIDGE * total.diagonal().mean() * eye + 1e-30 * eye, cross.sum(0))
    shared = shared.clamp(-LARGEST_GATE, LARGEST_GATE)
    pull = CHANNEL_RIDGE * square.diagonal(dim1=1, dim2=2).mean(-1)[:, None] + 1e-30
    own = torch.linalg.solve(square + pull[..., None] * eye, cross + pull * shared)
    for number, (values, part) in enumerate(gates):
        gate = values[f"gate_{part}"]
        opened = gate + shared[number].to(gate)
        if f"{part}_out_gain" in values and float(opened.abs()) >= SMALLEST_GATE:
            wanted = gate * values[f"{part}_out_gain"] + own[:, number].to(gate).clamp(-LARGEST_GATE, LARGEST_GATE)
            values[f"{part}_out_gain"] = wanted / opened
        values[f"gate_{part}"] = opened


def fitted_leaves(sets: Sets) -> list[Leaf]:
    """What a descent moves of parameter sets."""
    return [
        Leaf(values, GATE_RATE if kind.startswith("gate") else GAIN_RATE)
        for one in sets
        for kind, values in one.items()
        if kind in FITTED
    ]


def halves(sets: Sequence[Values]) -> Sets:
    """The values that files keep, float16."""
    return [{kind: values.detach().half().float() for kind, values in one.items()} for one in sets]


def with_sets(found: Replication, sets: Sequence[Values]) -> Replication:
    """The same steps with other parameters, on the processor as files keep them."""
    return replace(found, sets=tuple({kind: values.cpu().numpy() for kind, values in one.items()} for one in sets))


def fit_copies(  # noqa: PLR0917 (two models, the text, and the plan with its start and settings)
    student: Student,
    teacher: Student,
    windows: torch.Tensor,
    replication: Replication,
    parameters: Sequence[Values] | None,
    config: Any,
    *,
    workers: Workers | None = None,
    progress: Progress = silent,
) -> Sets:
    """The parameter sets of `replication`, one dict a set, fitted on token windows (n, context); float16 values.

    `parameters`: where to start; None: closed copies. Of `config`: steps (half on streams where there are any, half on
    logits), seed, batch (windows a step). The result is the same for any number of workers.
    """
    check_teacher(student.source, teacher.source)
    sets = opening_sets(student, replication, parameters)
    if not any(_set_of(replication, step) for step in replication.steps):
        return sets
    steps, seed, batch = (getattr(config, name, default) for name, default in DEFAULTS)
    copied = {step.layer for step in replication.steps if _set_of(replication, step)}
    fit = Distillation(student, teacher, windows, replication, copied, sets=sets)
    with open_workers(workers) as crew:
        fit.known(0)
        if fit.aligned:
            for layer in fit.spans:
                _ridge(fit, sets, layer, range(min(len(windows), RIDGE_WINDOWS)), crew)
        fit.descend(fitted_leaves(sets), steps, batch, seed, crew, progress)
    return halves(sets)
