"""The SSIM sum S of eq. 10, with everything that depends on the input image alone computed once.

The definition is pytorch-msssim's (11 x 11 Gaussian window, sigma 1.5, C1 = 0.01^2, C2 = 0.03^2), on images
zero-padded by 5 so that the map keeps H x W. The window is separable, so filtering with zero padding is a product
with one banded matrix on either side; at these sizes that is faster than a convolution, on a CPU by far.
"""

from __future__ import annotations

import dataclasses

import torch
from pytorch_msssim import SSIM
from torch import Tensor

WINDOW_SIZE, WINDOW_SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2

with torch.device("cpu"):  # whatever the default device is
    WINDOW: list[float] = SSIM(win_size=WINDOW_SIZE, win_sigma=WINDOW_SIGMA, channel=1).win.flatten().tolist()


@dataclasses.dataclass(frozen=True)
class SSIMReference:
    """Images [B, C, H, W] in [0, 1] with their local moments, ready to be compared with many others."""

    images: Tensor
    mean: Tensor
    variance: Tensor
    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, images: Tensor) -> SSIMReference:
        """The local moments of ``images``."""
        images = images.to(_exact_dtype(images))
        rows = _filter_matrix(images.shape[-2], images)
        columns = _filter_matrix(images.shape[-1], images).mT
        mean = rows @ images @ columns
        return cls(images, mean, rows @ images.square() @ columns - mean.square(), rows, columns)

    def take(self, index: Tensor) -> SSIMReference:
        """The reference of ``images[index]``."""
        return SSIMReference(self.images[index], self.mean[index], self.variance[index], self.rows, self.columns)

    def ssim_sum(self, others: Tensor) -> Tensor:
        """[B] sums over C x H x W of the SSIM map between each image and ``others`` [B, C, H, W] in [0, 1]."""
        precision, others = others.dtype, others.to(self.images.dtype)
        moments = torch.stack([others, others.square(), others * self.images])
        mean, square, product = self.rows @ moments @ self.columns
        cross = self.mean * mean
        luminance = (2 * cross + C1) / (self.mean.square() + mean.square() + C1)
        structure = (2 * (product - cross) + C2) / (self.variance + square - mean.square() + C2)
        return (luminance * structure).flatten(1).sum(dim=1).to(precision)


def _exact_dtype(images: Tensor) -> torch.dtype:
    """The images' precision, or float64 where products of float32 matrices may be rounded to TF32 or bfloat16."""
    exact = images.device.type != "cuda" and torch.get_float32_matmul_precision() == "highest"
    return images.dtype if exact else torch.float64


def _filter_matrix(size: int, like: Tensor) -> Tensor:
    """[size, size]: filtering one axis with the window, zeros outside."""
    window = like.new_tensor(WINDOW)
    offset = torch.arange(size, device=like.device)[None, :] - torch.arange(size, device=like.device)[:, None]
    offset = offset + WINDOW_SIZE // 2
    inside = (offset >= 0) & (offset < WINDOW_SIZE)
    return torch.where(inside, window[offset.clamp(0, WINDOW_SIZE - 1)], 0)
