"""Small generators for the tests: fixed weights, cheap, unequal axes, no use of torch's global generators."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def noise(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers that depend on ``seed`` and ``shape`` alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def uniform(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers in [0, 1) that depend on ``seed`` and ``shape`` alone: images, for instance."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class ToyBackbone(nn.Module):
    """tanh(conv(silu(conv(u)))): smooth, inside [-1, 1], a function of each latent alone.

    Args:
        image_shape: (C, H, W), any size.
        seed: of its weights, which are ordinary parameters.
        hidden: channels in between.
    """

    def __init__(self, image_shape: tuple[int, int, int] = (3, 8, 6), *, seed: int = 0, hidden: int = 8) -> None:
        super().__init__()
        self.image_shape = image_shape
        channels = image_shape[0]
        self.enter = nn.Parameter(noise(hidden, channels, 3, 3, seed=seed) / (9 * channels) ** 0.5)
        self.leave = nn.Parameter(noise(channels, hidden, 3, 3, seed=seed + 1) / (9 * hidden) ** 0.5)
        self.bias = nn.Parameter(0.1 * noise(hidden, seed=seed + 2))

    def generate(self, latents: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] from unit latents [B, C, H, W]."""
        hidden = F.silu(F.conv2d(latents, self.enter, self.bias, padding=1))
        return torch.tanh(F.conv2d(hidden, self.leave, padding=1))


class LinearBackbone(nn.Module):
    """G(u) = a u + b, element by element, so that optima are known in closed form.

    a lies in [0.05, 0.1] and b in [-0.2, 0.2]: images stay within [-1, 1] for latents within [-8, 8].
    """

    def __init__(self, image_shape: tuple[int, int, int] = (3, 8, 6), *, seed: int = 0) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.slope = nn.Parameter(0.05 + 0.05 * uniform(*image_shape, seed=seed))
        self.offset = nn.Parameter(0.4 * uniform(*image_shape, seed=seed + 1) - 0.2)

    def generate(self, latents: Tensor) -> Tensor:
        """Images [B, C, H, W] from unit latents [B, C, H, W]."""
        return self.slope * latents + self.offset


class CountingCompiler:
    """A backend of torch.compile that compiles nothing; counts graphs, and notes batch sizes of latents 3 x 8 x 6."""

    def __init__(self) -> None:
        self.graphs = 0
        self.sizes: list[int | None] = []

    def __call__(self, graph: Callable[..., Any], example: object) -> Callable[..., Any]:
        self.graphs += 1

        def run(*inputs: Any) -> Any:
            self.sizes.append(
                next((len(tensor) for tensor in inputs if tuple(getattr(tensor, "shape", ())[1:]) == (3, 8, 6)), None)
            )
            return graph(*inputs)

        return run
