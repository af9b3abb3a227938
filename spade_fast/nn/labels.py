"""γ and β that are rows of two parameters, by the label of each pixel (CLADE)."""

import torch

from ..layout import SemanticLayout
from .parts import ByLabel
from .pixels import resize


def at_labels(
    rows: ByLabel,
    condition: torch.Tensor | SemanticLayout,
    x: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Tables of γ and β, and the arguments of `spade_modulate` by which each pixel of x finds its
    row. The label of a pixel is the channel in which the condition [N, label_nc, *spatial] is
    largest, the first of several such channels; channels beyond the labels' do not count.
    """
    size, count = x.shape[2:], len(rows.gamma)
    if isinstance(condition, torch.Tensor):
        return *rows, {"index": resize(condition[:, :count], size).argmax(1)}
    windows = condition.windows(size, 1)
    codes = windows.hidden.rows[windows.table.rows.long()]  # a window of one tap sees one code
    labels = condition.palette[:, :count].argmax(1)[codes.long()]
    gamma, beta = (table[labels] for table in rows)
    return gamma, beta, {"index": windows.index, "order": windows.order}
