"""How far two images are apart, for losses: one number per image.

Sums over all elements, not means, as the papers write their norms.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pseudo_huber", "squared_l2"]


def squared_l2(a: Tensor, b: Tensor) -> Tensor:
    """||a - b||_2^2 over all but the first axis, [B]; arXiv 2303.01469, section 3."""
    difference = a - b
    return difference.to(torch.promote_types(difference.dtype, torch.float32)).square().flatten(1).sum(dim=1)


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """sqrt(||a - b||^2 + c^2) - c over all but the first axis, [B], c above 0; arXiv 2310.14189, eq. 8."""
    square = squared_l2(a, b)
    return square / ((square + c**2).sqrt() + c)  # the same without cancellation
