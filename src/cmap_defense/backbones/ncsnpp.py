"""NCSN++, the network of the published CIFAR-10 consistency models.

Song et al. 2021 (arXiv 2011.13456, appendix H), in the configuration of Song et al. 2023 (arXiv 2303.01469, appendix
C): BigGAN residual blocks, FIR resampling, residual input pyramid, Fourier embedding of the noise level.
Modules are registered in the order in which they are called; the converter relies on it (``convert/jcm.py``).
Attention is written out, not fused: the fused kernels have no second derivative, and exact attacks need one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmap_defense.backbones.fir import FIRDown, FIRDownConv, FIRUp
from cmap_defense.common.settings import Settings, setting
from cmap_defense.errors import SettingsError


@dataclasses.dataclass(frozen=True, kw_only=True)
class NCSNppConfig(Settings):
    """Architecture of ``NCSNpp``, with the names of the official configurations; the defaults are CIFAR-10's.

    What the official configurations offer besides is fixed at the published models' choice: resblock_type biggan,
    progressive none, progressive_input residual, progressive_combine sum, embedding_type fourier, SiLU.

    Attributes:
        nf: channels of the first convolution.
        ch_mult: channels of each level, in units of nf, finest first.
        num_res_blocks: residual blocks per level on the way down (one more on the way up).
        attn_resolutions: image sides at which self-attention is used.
        image_size: side of the square images, a multiple of 2^(levels - 1).
        num_channels: of the images.
        fir_kernel: four symmetric taps of the resampling filter.
        fourier_scale: standard deviation of the random frequencies.
        skip_rescale: whether sums of two branches are divided by sqrt 2.
        dropout: in the residual blocks.

    Raises:
        SettingsError: a value is out of its range, or a level's channels do not divide into normalisation groups.
    """

    nf: int = setting(128, minimum=1)
    ch_mult: tuple[int, ...] = setting((2, 2, 2), minimum=1)
    num_res_blocks: int = setting(4, minimum=1)
    attn_resolutions: tuple[int, ...] = setting((16,), minimum=1)
    image_size: int = setting(32, minimum=1)
    num_channels: int = setting(3, minimum=1)
    fir_kernel: tuple[float, float, float, float] = setting((1.0, 3.0, 3.0, 1.0), minimum=0.0)
    fourier_scale: float = setting(16.0, above=0.0)
    skip_rescale: bool = setting(True)
    dropout: float = setting(0.0, minimum=0.0, below=1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        taps, levels, side = self.fir_kernel, len(self.ch_mult), self.image_size
        unit = 2 ** max(0, levels - 1)
        wrong = {
            f"fir_kernel must be symmetric and not zero, but is {taps}": taps != taps[::-1] or sum(taps) <= 0,
            "ch_mult must name one level at least": not levels,
            f"image_size ({side}) must be a multiple of {unit}, for {levels} levels": side % unit,
            f"nf must be a multiple of 4, the size of a group, but is {self.nf}": self.nf % 4,
        }
        for text, fails in wrong.items():
            if fails:
                raise SettingsError(f"NCSNppConfig.{text}.")
        widths = (self.nf, *(self.nf * mult for mult in self.ch_mult))
        for channels in (*widths, *(a + b for a in widths for b in widths)):
            if channels % _groups(channels):
                raise SettingsError(
                    f"NCSNppConfig: {channels} channels do not divide into {_groups(channels)} groups of the "
                    "normalisation; choose another nf or ch_mult."
                )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return (self.num_channels, self.image_size, self.image_size)


class NCSNpp(nn.Module):
    """F(x, noise_level): the raw network inside a ``ConsistencyBackbone``."""

    exact_tensors = frozenset({"embed.frequencies"})
    """Kept in float32 whatever the precision of the rest: angles are hundreds of radians."""

    def __init__(self, config: NCSNppConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.nf * mult for mult in config.ch_mult]
        attended = [config.image_size >> level in config.attn_resolutions for level in range(len(widths))]

        def attention(level: int) -> Attention | None:
            return Attention(widths[level], config.skip_rescale) if attended[level] else None

        self.embed = NoiseEmbedding(config.nf, config.fourier_scale)
        self.enter = _conv(config.num_channels, config.nf)
        self.down = nn.ModuleList()
        skips, width, pyramid = [config.nf], config.nf, config.num_channels
        for level, channels in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.down.append(Stage(ResidualBlock(width, channels, config), attention(level)))
                width = channels
                skips.append(width)
            if level < len(widths) - 1:
                self.down.append(Shrink(pyramid, width, config))
                pyramid = width
                skips.append(width)
        middle = [Attention(width, config.skip_rescale), None]
        self.middle = nn.ModuleList(Stage(ResidualBlock(width, width, config), part) for part in middle)
        self.up = nn.ModuleList()
        for level, channels in reversed(list(enumerate(widths))):
            for i in range(config.num_res_blocks + 1):
                last = attention(level) if i == config.num_res_blocks else None
                self.up.append(Stage(ResidualBlock(width + skips.pop(), channels, config), last))
                width = channels
            if level > 0:
                self.up.append(ResidualBlock(width, width, config, FIRUp(config.fir_kernel)))
        self.norm = _group_norm(width)
        self.leave = _conv(width, config.num_channels, scale=0.0)

    def forward(self, x: Tensor, noise_level: Tensor) -> Tensor:
        """[B, C, H, W] and [B] levels ln(sigma) / 4, float32 or wider, to [B, C, H, W]."""
        embedding = self.embed(noise_level)
        h, pyramid = self.enter(x), x
        skips = [h]
        for part in self.down:
            if isinstance(part, Shrink):
                h = pyramid = part(h, pyramid, embedding)
            else:
                h = part(h, embedding)
            skips.append(h)
        for part in self.middle:
            h = part(h, embedding)
        for part in self.up:
            h = part(torch.cat([h, skips.pop()], dim=1) if isinstance(part, Stage) else h, embedding)
        return self.leave(F.silu(self.norm(h)))


class ExactFrequencies(nn.Module):
    """Base of noise embeddings: a network of few bits keeps the buffer "frequencies" in float32 at least."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move and cast as every module, except that the frequencies never get narrower than float32."""
        exact = self.get_buffer("frequencies")
        super()._apply(fn, recurse)
        moved = self.get_buffer("frequencies")
        if moved.dtype.itemsize < exact.dtype.itemsize:
            self.frequencies = exact.to(moved.device, torch.promote_types(moved.dtype, torch.float32))
        return self


class NoiseEmbedding(ExactFrequencies):
    """ln(sigma) / 4 to [B, 4 nf]: random Fourier features, then a small network."""

    def __init__(self, nf: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(nf))
        self.first = _linear(2 * nf, 4 * nf)
        self.second = _linear(4 * nf, 4 * nf)

    def forward(self, noise_level: Tensor) -> Tensor:
        frequencies = self.get_buffer("frequencies")
        wide = noise_level.to(torch.promote_types(noise_level.dtype, frequencies.dtype))
        angles = wide[:, None] * frequencies * 2 * math.pi
        features = torch.cat([angles.sin(), angles.cos()], dim=1).to(self.first.weight.dtype)
        return self.second(F.silu(self.first(features)))


class Shrink(nn.Module):
    """Half the resolution: a residual block, joined by the next step of the input pyramid."""

    def __init__(self, inputs: int, channels: int, config: NCSNppConfig) -> None:
        super().__init__()
        self.block = ResidualBlock(channels, channels, config, FIRDown(config.fir_kernel))
        self.pyramid = FIRDownConv(inputs, channels, config.fir_kernel)
        self.rescale = config.skip_rescale

    def forward(self, h: Tensor, pyramid: Tensor, embedding: Tensor) -> Tensor:
        return _joined(self.pyramid(pyramid), self.block(h, embedding), self.rescale)


class Stage(nn.Module):
    """One residual block, and at some levels self-attention behind it."""

    def __init__(self, block: nn.Module, attention: nn.Module | None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        h = self.block(h, embedding)
        return h if self.attention is None else self.attention(h)


class ResidualBlock(nn.Module):
    """BigGAN's block: both branches are resampled in it; a 1x1 convolution on the skip where anything changes."""

    def __init__(self, inputs: int, outputs: int, config: NCSNppConfig, resample: nn.Module | None = None) -> None:
        super().__init__()
        self.norm_in = _group_norm(inputs)
        self.resample = resample
        self.conv_in = _conv(inputs, outputs)
        self.embed = _linear(4 * config.nf, outputs)
        self.norm_out = _group_norm(outputs)
        self.dropout = nn.Dropout(config.dropout)
        self.conv_out = _conv(outputs, outputs, scale=0.0)
        self.skip = _conv(inputs, outputs, size=1) if inputs != outputs or resample is not None else None
        self.rescale = config.skip_rescale

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = F.silu(self.norm_in(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv_in(h) + self.embed(F.silu(embedding))[:, :, None, None]
        h = self.conv_out(self.dropout(F.silu(self.norm_out(h))))
        return _joined(x if self.skip is None else self.skip(x), h, self.rescale)


class Attention(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, channels: int, rescale: bool) -> None:
        super().__init__()
        self.norm = _group_norm(channels)
        self.query, self.key, self.value = (_linear(channels, channels, scale=0.1) for _ in range(3))
        self.project = _linear(channels, channels, scale=0.0)
        self.rescale = rescale

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).mT
        mixed = attend(self.query(tokens), self.key(tokens), self.value(tokens))
        return _joined(x, self.project(mixed).mT.unflatten(2, x.shape[2:]), self.rescale)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of [B, N, C] each, written out: it has a second derivative."""
    return torch.baddbmm(q.new_zeros(()), q, k.mT, beta=0, alpha=q.shape[-1] ** -0.5).softmax(dim=-1) @ v


def _joined(x: Tensor, h: Tensor, rescale: bool) -> Tensor:
    return (x + h) / math.sqrt(2) if rescale else x + h


def _groups(channels: int) -> int:
    return min(channels // 4, 32)


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(_groups(channels), channels, eps=1e-6)


def _conv(inputs: int, outputs: int, *, size: int = 3, scale: float = 1.0) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, size, padding=size // 2)
    return _initialised(layer, size**2 * inputs, size**2 * outputs, scale)


def _linear(inputs: int, outputs: int, *, scale: float = 1.0) -> nn.Linear:
    return _initialised(nn.Linear(inputs, outputs), inputs, outputs, scale)


def _initialised(layer: Any, fan_in: int, fan_out: int, scale: float) -> Any:
    """Uniform weights of variance 2 scale / (fan_in + fan_out), almost zero for scale 0; zero bias."""
    bound = math.sqrt(6 * max(scale, 1e-10) / (fan_in + fan_out))
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.zeros_(layer.bias)
    return layer
