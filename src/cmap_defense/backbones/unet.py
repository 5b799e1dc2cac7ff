"""The project's own network: a compact U-Net that a laptop can train and run.

Space-to-depth first (a patch of p x p pixels becomes p^2 channels), residual blocks with adaptive group
normalisation (Dhariwal and Nichol 2021, arXiv 2105.05233, section 3), self-attention at chosen levels, skips by
concatenation. The classes of a class-conditional network are added to the noise embedding, and start at zero.
Attention is written out, not fused: the fused kernels have no second derivative, and exact attacks need one.

Under autocast, what is added up along the network stays in the precision of the weights: the first layer, the
shortcuts, the modulation, the last layer. Consistency training compares the network's outputs at neighbouring noise
levels, and their difference would drown in the rounding of bfloat16.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cmap_defense.backbones.ncsnpp import ExactFrequencies, Stage, attend
from cmap_defense.common.settings import Settings, setting
from cmap_defense.errors import SettingsError


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig(Settings):
    """What U-Nets have in common.

    Attributes:
        image_shape: (C, H, W) in pixels; H and W are multiples of 2^(levels - 1), times the patch where there is one.
        channels: width of each level, finest first.
        blocks: residual blocks per level on the way down (one more on the way up).
        attention: for each level, whether its blocks are followed by self-attention.
        head_channels: channels of one attention head.
        dropout: probability of dropout in the blocks.
        num_classes: of a class-conditional network, None for another.
    """

    image_shape: tuple[int, int, int] = setting((3, 32, 32), minimum=1)
    channels: tuple[int, ...] = setting((48, 96), minimum=1)
    blocks: int = setting(2, minimum=1)
    attention: tuple[bool, ...] = setting((False, True))
    head_channels: int = setting(32, minimum=1)
    dropout: float = setting(0.0, minimum=0.0, below=1.0)
    num_classes: int | None = setting(None, minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        owner, levels, unit = type(self).__name__, len(self.channels), self._unit
        if len(self.attention) != levels or not levels:
            raise SettingsError(
                f"{owner}.channels must name one level at least, and attention one boolean per level, but they are "
                f"{self.channels!r} and {self.attention!r}."
            )
        if self.image_shape[1] % unit or self.image_shape[2] % unit:
            raise SettingsError(f"{owner}: image sides {self.image_shape[1:]} must be multiples of {unit}.")

    @property
    def _unit(self) -> int:
        """Pixels to a side of the coarsest level's."""
        return getattr(self, "patch", 1) * 2 ** max(0, len(self.channels) - 1)

    @property
    def attended(self) -> list[int]:
        """The channels of levels with attention; the middle has it too."""
        return sorted({c for c, flag in zip(self.channels, self.attention, strict=True) if flag} | {self.channels[-1]})


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompactUNetConfig(UNetConfig):
    """Architecture of a ``CompactUNet``. What is not below is as in ``UNetConfig``.

    Attributes:
        patch: edge of the space-to-depth patch.
        embedding: width of the noise embedding.

    Raises:
        SettingsError: a value is out of its range, or the values do not fit together.
    """

    patch: int = setting(2, minimum=1)
    embedding: int = setting(128, minimum=4)

    def __post_init__(self) -> None:
        super().__post_init__()
        for channels in self.attended:
            if channels % max(1, channels // self.head_channels):
                raise SettingsError(
                    f"CompactUNetConfig: {channels} channels with attention do not divide into heads of about "
                    f"{self.head_channels}; choose another head_channels."
                )
        coarsest = self.image_shape[1] * self.image_shape[2] // self._unit**2
        there = {*self.channels[-2:], sum(self.channels[-2:])}  # what comes to the coarsest level, and goes
        if coarsest == 1 and any(8 % channels == 0 for channels in there):
            raise SettingsError(
                "CompactUNetConfig: at the coarsest level each group of the normalisation has one value only. "
                "Use fewer levels, a smaller patch or more channels."
            )


class CompactUNet(nn.Module):
    """F(x, noise_level): the raw network inside a ``ConsistencyBackbone``."""

    def __init__(self, config: CompactUNetConfig) -> None:
        super().__init__()
        self.config = config
        pixels = config.image_shape[0] * config.patch**2
        self.embed = NoiseEmbedding(config.embedding)
        self.classes = None
        if config.num_classes is not None:
            self.classes = nn.Embedding(config.num_classes, config.embedding)
            nn.init.zeros_(self.classes.weight)
        self.enter = nn.Conv2d(pixels, config.channels[0], 3, padding=1)

        def stage(inputs: int, outputs: int, attend: bool) -> Stage:
            block = ResidualBlock(inputs, outputs, config.embedding, config.dropout)
            return Stage(block, SelfAttention(outputs, config.head_channels) if attend else None)

        self.down = nn.ModuleList()
        skips = [config.channels[0]]
        width = config.channels[0]
        for level, channels in enumerate(config.channels):
            for _ in range(config.blocks):
                self.down.append(stage(width, channels, config.attention[level]))
                width = channels
                skips.append(width)
            if level + 1 < len(config.channels):
                self.down.append(Downsample(width))
                skips.append(width)

        self.middle = nn.ModuleList(stage(width, width, attend) for attend in (True, False))

        self.up = nn.ModuleList()
        for level, channels in reversed(list(enumerate(config.channels))):
            for _ in range(config.blocks + 1):
                self.up.append(stage(width + skips.pop(), channels, config.attention[level]))
                width = channels
            if level > 0:
                self.up.append(Upsample(width))

        self.norm = _group_norm(width)
        self.leave = nn.Conv2d(width, pixels, 3, padding=1)
        _zero(self.leave)

    def forward(self, x: Tensor, noise_level: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """[B, C, H, W], [B] levels ln(sigma) / 4 in float32 or wider, and [B] labels or None, to [B, C, H, W]."""
        embedding = self.embed(noise_level)
        if self.classes is not None:
            embedding = embedding + self.classes(class_labels)
        h = _not_autocast(self.enter, F.pixel_unshuffle(x, self.config.patch))
        skips = [h]
        for part in self.down:
            h = part(h, embedding)
            skips.append(h)
        for part in self.middle:
            h = part(h, embedding)
        for part in self.up:
            if isinstance(part, Stage):
                h = torch.cat([h, skips.pop()], dim=1)
            h = part(h, embedding)
        return F.pixel_shuffle(_not_autocast(self.leave, F.silu(self.norm(h))), self.config.patch)


class NoiseEmbedding(ExactFrequencies):
    """ln(sigma) / 4 to an embedding: sines and cosines of slow frequencies, then a small network.

    Consistency training needs an embedding that varies slowly with the noise level (Song and Dhariwal 2023,
    arXiv 2310.14189, section 3.1): the fastest of these has a period of 1/4, a factor e in sigma.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        frequencies = 2 * math.pi * torch.logspace(-2, 2, width // 4, base=2.0)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.first = nn.Linear(2 * (width // 4), width)
        self.second = nn.Linear(width, width)

    def forward(self, noise_level: Tensor) -> Tensor:
        frequencies: Tensor = self.get_buffer("frequencies")
        angles = noise_level.to(torch.promote_types(noise_level.dtype, frequencies.dtype))[:, None] * frequencies
        features = torch.cat([angles.sin(), angles.cos()], dim=1).to(self.first.weight.dtype)
        return F.silu(self.second(F.silu(self.first(features))))


class ResidualBlock(nn.Module):
    """h + conv(modulated norm(conv(norm h))), the last convolution starting at zero."""

    def __init__(self, inputs: int, outputs: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.norm_in = _group_norm(inputs)
        self.conv_in = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulate = nn.Linear(embedding, 2 * outputs)
        self.norm_out = _group_norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)
        _zero(self.conv_out)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv_in(F.silu(self.norm_in(x)))
        scale, shift = _not_autocast(self.modulate, embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.norm_out(h) * (1 + scale) + shift
        shortcut = _not_autocast(self.skip, x) if isinstance(self.skip, nn.Conv2d) else x
        return shortcut + self.conv_out(self.dropout(F.silu(h)))


class SelfAttention(nn.Module):
    """x + attention over all positions, several heads, the output projection starting at zero."""

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // head_channels)
        self.norm = _group_norm(channels)
        self.project_in = nn.Conv2d(channels, 3 * channels, 1)
        self.project_out = nn.Conv2d(channels, channels, 1)
        _zero(self.project_out)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(
            self.project_in(self.norm(x)), "b (three heads c) y x -> three (b heads) (y x) c", three=3, heads=self.heads
        )
        mixed = rearrange(attend(q, k, v), "(b heads) (y x) c -> b (heads c) y x", heads=self.heads, y=x.shape[2])
        return x + self.project_out(mixed)


class Downsample(nn.Module):
    """Half the resolution by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(h)


class Upsample(nn.Module):
    """Twice the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))


def _not_autocast(layer: nn.Conv2d | nn.Linear, x: Tensor) -> Tensor:
    """The layer in the precision of its weights."""
    with torch.autocast(x.device.type, enabled=False):
        return layer(x.to(layer.weight.dtype))


def _group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with as many groups, 8 at most, as divide the channels."""
    return nn.GroupNorm(math.gcd(channels, 8), channels)


def _zero(layer: Any) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
