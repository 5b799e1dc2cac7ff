"""Networks by name, with fresh weights.

"compact" is this project's U-Net, "ncsnpp" that of the published CIFAR-10 models (arXiv 2303.01469, appendix C),
"imagenet64" that of the published ImageNet-64 models (the same appendix; Dhariwal and Nichol 2021, arXiv 2105.05233),
built by the diffusers library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from cmap_defense.backbones.diffusers import PipelineUNet, configuration_of, fresh_unet, openai_unet
from cmap_defense.backbones.ncsnpp import NCSNpp, NCSNppConfig
from cmap_defense.backbones.unet import CompactUNet, CompactUNetConfig, UNetConfig
from cmap_defense.common.files import refuse_other_settings
from cmap_defense.common.modules import building
from cmap_defense.common.settings import near_matches, setting
from cmap_defense.errors import SettingsError, UnknownNameError

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "small": {"channels": (32, 64), "attention": (False, True)},
    "cifar10": {
        "patch": 1,
        "channels": (64, 128, 128),
        "blocks": 3,
        "attention": (False, True, True),
        "head_channels": 64,
        "embedding": 256,
    },
}
"""Configurations of the compact network by name: changes to the defaults of ``CompactUNetConfig``.

"small" has 1 million parameters; "cifar10" has 9.6 million, for images 3 x 32 x 32.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNet64Config(UNetConfig):
    """The U-Net of the published ImageNet-64 models; the defaults are theirs. The rest is as in ``UNetConfig``.

    Attributes:
        groups: groups of the group normalisations.
    """

    image_shape: tuple[int, int, int] = setting((3, 64, 64), minimum=1)
    channels: tuple[int, ...] = setting((192, 384, 576, 768), minimum=1)
    blocks: int = setting(3, minimum=1)
    attention: tuple[bool, ...] = setting((False, True, True, True))
    head_channels: int = setting(64, minimum=1)
    groups: int = setting(32, minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, widths in (("groups", self.channels), ("head_channels", self.attended)):
            for width in widths:
                if width % getattr(self, name):
                    raise SettingsError(f"UNet64Config.{name} ({getattr(self, name)}) must divide {width} channels.")

    def to_unet(self) -> dict[str, Any]:
        """The same as a configuration of diffusers' UNet2DModel."""
        return openai_unet(
            self.image_shape,
            self.channels,
            self.attention,
            self.groups,
            layers_per_block=self.blocks,
            attention_head_dim=self.head_channels,
            dropout=self.dropout,
            num_class_embeds=self.num_classes,
        )


def _ncsnpp(image_shape: tuple[int, int, int], num_classes: int | None, changes: dict[str, Any]) -> NCSNppConfig:
    channels, height, width = image_shape
    if height != width:
        raise SettingsError(f"The network ncsnpp takes square images, but these are {height} x {width}.")
    if num_classes is not None:
        raise SettingsError("The network ncsnpp is not class-conditional: choose compact or imagenet64.")
    return NCSNppConfig.from_dict({"num_channels": channels, "image_size": height} | changes)


def _shaped(config: type[Any]) -> Callable[[tuple[int, int, int], int | None, dict[str, Any]], Any]:
    return lambda shape, classes, changes: config.from_dict({"image_shape": shape, "num_classes": classes} | changes)


_SHAPE = frozenset({"image_shape", "num_classes"})
_KINDS: dict[str, tuple[Callable[..., Any], Callable[[Any, str], nn.Module], frozenset[str]]] = {
    "compact": (_shaped(CompactUNetConfig), lambda config, device: CompactUNet(config), _SHAPE),
    "ncsnpp": (_ncsnpp, lambda config, device: NCSNpp(config), frozenset({"image_size", "num_channels"})),
    "imagenet64": (_shaped(UNet64Config), lambda config, device: fresh_unet(config.to_unet(), device), _SHAPE),
}
"""Name -> configuration from (image shape, classes, changes), network from it, and what the data decide in it."""

NETWORKS = tuple(_KINDS)
"""Names that ``Network.named`` knows."""


@dataclasses.dataclass(frozen=True)
class Network:
    """A network that is yet to be built.

    Attributes:
        name: one of ``NETWORKS``.
        config: its settings.
        image_shape: (C, H, W) of its images.
        num_classes: number of classes; None for an unconditional network.
    """

    name: str
    config: Any
    image_shape: tuple[int, int, int]
    num_classes: int | None = None

    @classmethod
    def named(
        cls,
        name: str,
        image_shape: tuple[int, int, int],
        changes: Mapping[str, Any] | None = None,
        *,
        num_classes: int | None = None,
    ) -> Network:
        """A network for images of this shape.

        Args:
            name: one of ``NETWORKS``.
            image_shape: (C, H, W).
            changes: to the defaults of its configuration, such as one of ``PRESETS``.
            num_classes: number of classes; None for an unconditional network.

        Raises:
            UnknownNameError: there is no such network.
            SettingsError: a change is unknown or out of its range, or the network does not fit the images.
        """
        if name not in _KINDS:
            raise UnknownNameError(f"There is no network {name!r}.{near_matches(name, NETWORKS)}")
        configure, _, decided = _KINDS[name]
        changes = dict(changes or {})
        for field in sorted(decided & changes.keys()):
            raise SettingsError(f"{field} of the network {name} is that of the data, and cannot be set.")
        return cls(name, configure(image_shape, num_classes, changes), image_shape, num_classes)

    @property
    def changes(self) -> dict[str, Any]:
        """All fields of the configuration that the data do not decide, as JSON values: ``named`` with them gives
        an equal network."""
        decided = _KINDS[self.name][2]
        return {field: value for field, value in self.config.to_dict().items() if field not in decided}

    def build(self, device: str = "cpu") -> nn.Module:
        """The network F in float32, with fresh weights drawn from torch's global generator, whose state is restored.

        Args:
            device: "cpu", or "meta" for a network without values.

        Raises:
            MissingExtraError: it needs the diffusers library.
        """
        with building(device):
            return _KINDS[self.name][1](self.config, device)

    def describe(self) -> dict[str, Any]:
        """Name and configuration as JSON, for records and checkpoints."""
        return {"name": self.name, **self.config.to_dict()}


def refuse_other_network(network: nn.Module, other: nn.Module) -> None:
    """Raises ``SettingsError`` unless a network, which may be on the device "meta", can take the weights of the other
    one.

    Their dropout may differ; the message says what else does.
    """
    before, now = _architecture(other), _architecture(network)
    if before["network"] != now["network"]:  # whose settings have other names
        before, now = ({"network": found["network"]} for found in (before, now))
    refuse_other_settings(
        before,
        now,
        SettingsError,
        what="The weights to start from are those of another network",
        remedy="Give the network the same settings.",
    )


def _architecture(network: nn.Module) -> dict[str, Any]:
    """Class and configuration of a network, without what acts in training alone."""
    if isinstance(network, PipelineUNet):
        config = {name: value for name, value in configuration_of(network).items() if not name.startswith("_")}
    else:
        settings: Any = network.config
        config = settings.to_dict()
    return {"network": type(network).__name__} | {name: value for name, value in config.items() if name != "dropout"}
