"""The methods of the field, each re-implemented from its paper's formulas and public code.

One file for each family; its docstring names paper, equation and the authors' settings. All get
the same model, layers, examples and statistics (``method.Study``), and give a model and what it
weighs. Where a method needs a Fisher matrix, it comes from the same labels as rankfold's own: the
data's, or ones drawn from the model's predictions where it has memorised its training labels.
"""

from __future__ import annotations

from benchmarks.methods import fisher, int8, kfac_svd, ours, plain_svd, pruning, svd_llm, zero_sum
from benchmarks.methods.method import Method

METHODS: dict[str, Method] = {
    **plain_svd.METHODS,
    **svd_llm.METHODS,
    **fisher.METHODS,
    **kfac_svd.METHODS,
    **zero_sum.METHODS,
    **ours.METHODS,
    **int8.METHODS,
    **pruning.METHODS,
}
