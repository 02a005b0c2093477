"""Owns which comes first where both help: the tuning of the single copy, or copies of the model as it came.

A model whose layers were tuned to make up for an execution that they lack has little left for a copy to win. So copies
are chosen before the tuning as well, and the way that ends nearer to the teacher is taken.
"""

from __future__ import annotations

from rondel.quant.judgement import DELTA, Splits, Teacher, Verdict, paired, token_losses
from rondel.quant.selection import Choice
from rondel.quant.student import Student, base_path


def copies_instead_of_tuning(
    before: tuple[Student, Choice], after: tuple[Student, Choice], teacher: Teacher, splits: Splits, seed: int
) -> Verdict | None:
    """The copies of the model as it came against its tuned single copy, where they are the better way; else None.

    `before`: the model as it came and what was chosen for it; `after`: the same of the tuned one. The text that chose
    decides between the two ways; on the text that chose nothing, the copies must surely be better than the tuning.
    """
    (model, early), (tuned, late) = before, after
    if early.replication is None:
        return None
    path = late.replication or base_path(tuned.layers)
    if early.losses["kl"] >= float(token_losses(tuned, teacher, splits.select, path).kl.mean()) - DELTA:
        return None
    copies = token_losses(model, teacher, splits.confirm, early.replication)
    single = token_losses(tuned, teacher, splits.confirm, base_path(tuned.layers))
    verdict = paired(copies.kl, single.kl, seed)
    return verdict if verdict.better() else None
