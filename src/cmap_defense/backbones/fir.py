"""Resampling by two with a four-tap filter, as in NCSN++ (Song et al. 2021, arXiv 2011.13456, appendix H).

With K = outer(taps, taps) / sum(taps)^2 every channel is filtered alone:

- down: K at stride 2, one pixel of zero padding;
- up: the transpose of that with 4 K, so that a constant image stays constant away from its border.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _FIR(nn.Module):
    """Holds K; it follows the module's device and precision and is not part of its state."""

    def __init__(self, taps: tuple[float, ...]) -> None:
        super().__init__()
        one = torch.tensor(taps, dtype=torch.float64)
        kernel = torch.outer(one, one) / one.sum() ** 2
        self.register_buffer("kernel", kernel.float(), persistent=False)

    def weight(self, channels: int, dtype: torch.dtype) -> Tensor:
        """K once per channel, [C, 1, 4, 4]."""
        return self.get_buffer("kernel").to(dtype).expand(channels, 1, -1, -1)


class FIRDown(_FIR):
    """[B, C, H, W] to [B, C, H/2, W/2]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight(x.shape[1], x.dtype), stride=2, padding=1, groups=x.shape[1])


class FIRUp(_FIR):
    """[B, C, H, W] to [B, C, 2H, 2W]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, 4 * self.weight(x.shape[1], x.dtype), stride=2, padding=1, groups=x.shape[1])


class FIRDownConv(_FIR):
    """Filter, then a 3x3 convolution at stride 2: [B, C, H, W] to [B, D, H/2, W/2]."""

    def __init__(self, inputs: int, outputs: int, taps: tuple[float, ...]) -> None:
        super().__init__(taps)
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.conv2d(x, self.weight(x.shape[1], x.dtype), padding=2, groups=x.shape[1]))
