"""Other models that a training begins with: the one whose weights are the first ones, and the teacher."""

from __future__ import annotations

from typing import Any

from torch import nn

from cmap_defense.backbones.diffusers import PipelineUNet, configuration_of
from cmap_defense.backbones.karras import KarrasModel
from cmap_defense.errors import SettingsError
from cmap_defense.files import refuse_other_settings

__all__ = ["load_weights", "refuse_other_network", "source_of"]


def source_of(model: KarrasModel) -> dict[str, Any]:
    """Name, kind and checksum of a model that came from a folder, for records."""
    assert model.record is not None
    return {name: getattr(model.record, name) for name in ("name", "kind", "weights_sha256")}


def load_weights(model: KarrasModel, start: KarrasModel) -> None:
    """Copy the weights of ``start`` into ``model``, whose network is the same; their dropout may differ.

    Raises:
        SettingsError: it is another network, and the message says in what.
    """
    refuse_other_network(model.network, start.network)
    model.network.load_state_dict(start.network.state_dict())


def refuse_other_network(network: nn.Module, other: nn.Module) -> None:
    """Raises :class:`SettingsError` unless ``other`` could lend ``network``, which may be on the meta device, its
    weights."""
    there, own = _architecture(other), _architecture(network)
    if there["network"] != own["network"]:  # whose settings have other names
        there, own = ({"network": found["network"]} for found in (there, own))
    refuse_other_settings(
        there,
        own,
        SettingsError,
        what="The weights to start from are those of another network",
        remedy="Give the network the same settings.",
    )


def _architecture(network: nn.Module) -> dict[str, Any]:
    """Class and configuration of a network, but for what acts in training alone."""
    if isinstance(network, PipelineUNet):
        config = {name: value for name, value in configuration_of(network).items() if not name.startswith("_")}
    else:
        settings: Any = network.config
        config = settings.to_dict()
    return {"network": type(network).__name__} | {name: value for name, value in config.items() if name != "dropout"}
