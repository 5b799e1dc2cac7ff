"""Generative models for CMAP: the protocol, our network, folders on disk, names and the Hub."""

from cmap_defense.backbones.base import Backbone
from cmap_defense.backbones.folder import read_backbone, read_record, write_backbone
from cmap_defense.backbones.karras import ConsistencyBackbone, NoiseRange
from cmap_defense.backbones.load import load_backbone
from cmap_defense.backbones.record import BackboneRecord
from cmap_defense.backbones.registry import backbone_names, registry_entry
from cmap_defense.backbones.unet import CompactUNet, CompactUNetConfig

__all__ = [
    "Backbone",
    "BackboneRecord",
    "CompactUNet",
    "CompactUNetConfig",
    "ConsistencyBackbone",
    "NoiseRange",
    "backbone_names",
    "load_backbone",
    "read_backbone",
    "read_record",
    "registry_entry",
    "write_backbone",
]
