"""Owns where a teacher's residual stream may be compared with a student's: behind which layers, and in which basis.

A quantized model with all its teacher's layers in its basis compares as it stands. A rotated one has the same stream
turned, and the turn is read off the two embeddings. A deeper teacher is taken as the student's layers, some of which
stand more than once: each of its layers is assigned to the layer of the student that adds what is most like it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn.functional import cosine_similarity

from rondel.quant.student import Student

LARGEST_ERROR = 0.9  # of the teacher's norm: beyond it two embeddings have nothing in common (independent ones: 1.41)
SMALLEST_LIKENESS = 0.5  # mean cosine of what assigned layers add; 2-bit layers have 0.8 to 0.95, strangers near 0
TOKENS_A_CHANNEL = 4  # whose embeddings a turn is read off: of as many, independent ones would stay 1.07 apart
MATCHED_WINDOWS = 2  # that layers are compared on


@dataclass(frozen=True)
class Alignment:
    """Which of the teacher's layers ends what a layer of the student stands for, and the turn between the bases."""

    teacher: Student
    ends: tuple[int, ...]  # one a layer of the student
    turn: torch.Tensor | None = None  # (width, width): a row of the teacher's stream times it is in the student's basis

    def streams(self, tokens: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The teacher's stream before the first layer and behind each of the student's, in the student's basis; and
        the stream that the teacher's own head reads."""
        before = self.teacher.embed(tokens)
        after = self.teacher.streams(tokens)
        found = [before, *(after[end] for end in self.ends)]
        return found if self.turn is None else [x @ self.turn for x in found], after[-1]


def align(student: Student, teacher: Student, windows: torch.Tensor) -> Alignment | None:
    """How the streams of both compare, by a few of the token windows (n, context); None where they do not."""
    if teacher.numbers.width != student.numbers.width or teacher.layers < student.layers:
        return None
    with torch.no_grad():
        turn, known = _turn(student, teacher)
        if not known:
            return None
        if teacher.layers == student.layers:
            return Alignment(teacher, tuple(range(student.layers)), turn)
        ends = _ends(_likeness(student, teacher, windows[:MATCHED_WINDOWS], turn))
        return Alignment(teacher, ends, turn) if ends else None


def _turn(student: Student, teacher: Student) -> tuple[torch.Tensor | None, bool]:
    """The orthogonal matrix between the two streams, None where they share a basis; and whether one was found."""
    if student.numbers.vocabulary != teacher.numbers.vocabulary:
        return None, False
    every = torch.arange(student.numbers.vocabulary)[None]
    own, other = student.embed(every)[0], teacher.embed(every)[0]
    limit = LARGEST_ERROR * other.norm()
    if (own - other).norm() < limit:
        return None, True
    u, _, v = torch.linalg.svd((other.T @ own).double(), full_matrices=False)  # orthogonal Procrustes problem
    turn = (u @ v).to(own)
    enough = len(own) >= TOKENS_A_CHANNEL * own.shape[1]
    return turn, enough and bool((own - other @ turn).norm() < limit)


def _likeness(
    student: Student, teacher: Student, windows: torch.Tensor, turn: torch.Tensor | None
) -> list[list[float]]:
    """For each layer of the teacher and each of the student: the mean cosine of what both add to the same stream."""
    streams = [teacher.embed(windows), *teacher.streams(windows)]
    streams = streams if turn is None else [x @ turn for x in streams]
    found = []
    for before, after in pairwise(streams):
        row = []
        for layer in range(student.layers):
            attended, _ = student.attention(layer, before)
            added = attended + student.feed_forward(layer, before + attended)
            row.append(float(cosine_similarity(added, after - before, dim=-1).mean()))
        found.append(row)
    return found


def _ends(likeness: list[list[float]]) -> tuple[int, ...] | None:
    """The last teacher's layer of each student's, of the assignment in order that leaves out none and is most alike."""
    layers = len(likeness[0])
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (likeness[0][0], (0,))}  # by the layer assigned last
    for row in likeness[1:]:
        following = {}
        for layer in range(layers):
            options = [best[previous] for previous in (layer - 1, layer) if previous in best]
            if options:
                total, assigned = max(options)
                following[layer] = total + row[layer], (*assigned, layer)
        best = following
    total, assigned = best[layers - 1]
    if total < SMALLEST_LIKENESS * len(likeness):
        return None
    return tuple(max(i for i, layer in enumerate(assigned) if layer == one) for one in range(layers))
