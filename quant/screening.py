"""Owns what one look at each layer tells about copies of it, before anything is fitted.

Each layer runs on its teacher's stream, and what it fails to make of it is regressed, channel by channel, on what the
layer adds (the gain control: nothing runs twice) and then on what further executions would add as well. Held-out tokens
tell how much of the error only those explain (an incremental R2), beside what a low-rank term of as many bytes would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rondel.converters.errors import RondelError
from rondel.quant.alignment import Alignment
from rondel.quant.descent import divergence
from rondel.quant.reference import rms_norm
from rondel.quant.student import Student, base_path
from rondel.quant.workers import Workers

TOKENS = 8192  # that are looked at, half to fit and half to tell
TOKENS_A_CHANNEL = 4  # where a wide model needs more for its low-rank rival
RESTORED_TOKENS = 1024  # that tell what a layer's error costs
RIDGE = 1e-3  # of a branch's energy
RIVAL_RIDGES = (1e-3, 0.1)  # of its inputs' mean energy; few tokens need much, and the rival gets the better one
SHARPER = 1.5  # the gain of parallel queries: at one, a parallel attention adds what its layer adds already
SMALLEST_SHARE = 0.005  # of a layer's error, that a copy must explain beyond gains

PARTS = ("block", "attn", "ffn")
MODES = ("serial", "parallel")


@dataclass(frozen=True)
class Screened:
    """What one kind of copy of one layer promises."""

    layer: int
    mode: str
    parts: str
    gains: float  # share of the layer's error that gains and a bias explain, on held-out tokens
    copy: float  # what the copy explains beyond them
    low_rank: float  # what a low-rank term of the copy's bytes explains beyond them
    error: float  # nats a token that are won if this layer makes what it should; below 0 where others make up for it

    @property
    def promise(self) -> float:
        """Nats a token that the copy may win: its share of what the layer's error costs. It orders and rejects nothing.

        Layers that were tuned make up for each other, and none of them alone costs anything then.
        """
        return self.copy * max(self.error, 0.0)

    def failure(self) -> str | None:
        """Why the copy is not worth a fit; None where it is."""
        if self.copy <= max(SMALLEST_SHARE, self.low_rank):
            return (
                f"explains {self.copy:.4f} of the layer's error beyond gains; worth a fit above {SMALLEST_SHARE} and "
                f"what low rank of its bytes explains, {self.low_rank:.4f}"
            )
        return None

    def told(self) -> dict[str, float]:
        """The numbers, for a log."""
        return {
            "gains_r2": self.gains,
            "copy_r2": self.copy,
            "low_rank_r2": self.low_rank,
            "error_nats": self.error,
            "promised_nats": self.promise,
        }


def screen(
    student: Student,
    aligned: Alignment,
    windows: torch.Tensor,
    workers: Workers,
    *,
    modes: Sequence[str] = MODES,
    parts: Sequence[str] = PARTS,
) -> list[Screened]:
    """What copies of each of `parts` of each layer promise in each of `modes`, on token windows (n, context)."""
    wanted = max(TOKENS, TOKENS_A_CHANNEL * student.numbers.width)
    windows = windows[: max(2, -(-wanted // windows.shape[1]))]
    if len(windows) < 2:
        raise RondelError("the text has one window to fit on; screening the layers needs two, give more --text")

    def streams(window: int) -> list[torch.Tensor]:
        with torch.no_grad():
            return aligned.streams(windows[window][None])[0]

    rows = list(workers.map(streams, range(len(windows))))
    columns = [torch.cat(column) for column in zip(*rows, strict=True)]
    errors = _restored(student, aligned, windows[-max(1, RESTORED_TOKENS // windows.shape[1]) :], columns, workers)

    def measure(layer: int) -> list[Screened]:
        with torch.no_grad():
            looked_at = _Layer(student, layer, columns[layer], columns[layer + 1])
            return looked_at.screened(modes, parts, errors[layer])

    return [one for found in workers.map(measure, range(student.layers)) for one in found]


def _restored(
    student: Student, aligned: Alignment, windows: torch.Tensor, columns: Sequence[torch.Tensor], workers: Workers
) -> list[float]:
    """How much nearer the student comes to its teacher, in nats a token, if one layer makes what it should."""
    path = base_path(student.layers)

    def measure(window: int) -> list[float]:
        offset = len(columns[0]) - len(windows)
        with torch.no_grad():
            tokens = windows[window][None]
            wanted = aligned.teacher.logits(tokens)
            x, found = student.embed(tokens), []
            for layer in range(student.layers):
                x = _made(student, layer, x)
                before, after = (columns[layer + i][offset + window][None] for i in (0, 1))
                restored = x + after - _made(student, layer, before)
                if layer + 1 < student.layers:
                    restored = [y for _, y in student.groups(restored, path, first=layer + 1)][-1]
                found.append(float(divergence(student.head(restored), wanted)))
            base = float(divergence(student.head(x), wanted))
            return [base - one for one in found]

    found = list(workers.map(measure, range(len(windows))))
    return [sum(column) / len(found) for column in zip(*found, strict=True)]


def _made(student: Student, layer: int, x: torch.Tensor) -> torch.Tensor:
    """The stream behind one execution of a layer."""
    x = x + student.attention(layer, x)[0]
    return x + student.feed_forward(layer, x)


class _Layer:
    """One layer on its teacher's stream: its error, what it adds itself, and what further executions add."""

    def __init__(self, student: Student, layer: int, before: torch.Tensor, after: torch.Tensor) -> None:
        self.student, self.layer, self.x = student, layer, before
        self.attended, self.keys = student.attention(layer, before)
        self.fed = student.feed_forward(layer, before + self.attended)
        self.made = before + self.attended + self.fed
        self.spread = after.flatten(0, 1).std(0).clamp_min(1e-6)
        self.cut = len(before) // 2 * before.shape[1]  # tokens to fit on; the others tell
        self.error = self._scaled(after - self.made)
        self.energy = float(self.error[self.cut :].double().square().sum())
        self.own = [self._scaled(x) for x in (torch.ones_like(before), self.attended, self.fed)]

    def _scaled(self, x: torch.Tensor) -> torch.Tensor:
        """As rows of tokens, in the teacher's spread of each channel."""
        return (x / self.spread).flatten(0, 1)

    def screened(self, modes: Sequence[str], parts: Sequence[str], error: float) -> list[Screened]:
        """Every kind of copy; `error`: nats a token that the layer's error costs. None for a layer without error."""
        if self.energy == 0:
            return []
        coefficients = self._fitted(self.own)
        gains = self._explained(self.own, coefficients)
        left = self.error - sum(c * u for c, u in zip(coefficients, self.own, strict=True))
        rivals = {rank: self._low_rank(left, rank) for rank in (1, 2)}
        found = []
        for mode in modes:
            for part in parts:
                further = [*self.own, *self._further(mode, part)]
                copy = self._explained(further, self._fitted(further)) - gains
                rank = 2 if part == "block" else 1  # the gains of norms and outputs of one part: 2 width values
                found.append(Screened(self.layer, mode, part, gains, copy, rivals[rank], error))
        return found

    def _further(self, mode: str, parts: str) -> list[torch.Tensor]:
        """What another execution adds; the feed-forward part of a block sees its attention through a fitted gate."""
        student, layer = self.student, self.layer
        x, branches = (self.made if mode == "serial" else self.x), []
        if parts != "ffn":
            values = {"q_head_gain": torch.full((student.numbers.heads,), SHARPER)} if mode == "parallel" else {}
            attended, _ = student.attention(layer, x, values, self.keys if mode == "parallel" else None)
            branches.append(self._scaled(attended))
            if parts == "block":
                x = x + self._gate(branches[0]) * attended
        if parts != "attn":
            branches.append(self._scaled(student.feed_forward(layer, x)))
        return branches

    def _gate(self, branch: torch.Tensor) -> float:
        """How far a branch should be open, beside the layer's own, one number for all channels."""
        used = [*self.own[1:], branch]
        square = torch.stack([torch.stack([_dot(u, v, self.cut) for v in used]) for u in used])
        cross = torch.stack([_dot(u, self.error, self.cut) for u in used])
        square = square + torch.diag(RIDGE * square.diagonal() + 1e-30)
        return float(torch.linalg.solve(square, cross)[-1].clamp(0, 1))

    def _fitted(self, branches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Ridge coefficients (width,) of each branch, a channel at a time, on the first tokens."""
        square, cross = _moments(branches, self.error, slice(0, self.cut))
        ridge = RIDGE * square.diagonal(dim1=1, dim2=2) + 1e-30
        return list(torch.linalg.solve(square + torch.diag_embed(ridge), cross).to(self.error).T)

    def _explained(self, branches: Sequence[torch.Tensor], coefficients: Sequence[torch.Tensor]) -> float:
        """The share of the error on the other tokens that the sum explains."""
        left = self.error - sum(c * u for c, u in zip(coefficients, branches, strict=True))
        return 1 - float(left[self.cut :].double().square().sum()) / self.energy

    def _low_rank(self, left: torch.Tensor, rank: int) -> float:
        """What a reduced-rank regression of the rest on the input of either part explains, at its best."""
        student, best = self.student, 0.0
        for role, x in (("attn_norm", self.x), ("ffn_norm", self.x + self.attended)):
            read = rms_norm(x, student.norm(self.layer, role), student.numbers.norm_epsilon).flatten(0, 1)
            shown, told = read[: self.cut], read[self.cut :]
            square, cross = (shown.T @ shown).double(), (shown.T @ left[: self.cut]).double()
            damping = square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype, device=square.device)
            for ridge in RIVAL_RIDGES:
                map_ = torch.linalg.solve(square + ridge * damping, cross)
                explained = shown.double() @ map_
                axes = torch.linalg.eigh(explained.T @ explained)[1][:, -rank:]
                after = left[self.cut :] - (told.double() @ map_ @ axes @ axes.T).to(left)
                gained = left[self.cut :].double().square().sum() - after.double().square().sum()
                best = max(best, float(gained) / self.energy)
        return best


def _dot(u: torch.Tensor, v: torch.Tensor, cut: int) -> torch.Tensor:
    return (u[:cut].double() * v[:cut]).sum()


def _moments(branches: Sequence[torch.Tensor], error: torch.Tensor, tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over tokens, a channel at a time: (width, n, n) of pairs of branches, (width, n) of branches and error."""
    count = len(branches)
    square = torch.empty(error.shape[1], count, count, dtype=torch.float64, device=error.device)
    cross = torch.empty(error.shape[1], count, dtype=torch.float64, device=error.device)
    for i, u in enumerate(branches):
        for j in range(i + 1):
            square[:, i, j] = square[:, j, i] = (u[tokens] * branches[j][tokens]).sum(0, dtype=torch.float64)
        cross[:, i] = (u[tokens] * error[tokens]).sum(0, dtype=torch.float64)
    return square, cross
