"""Generative models for CMAP: the protocol, networks, folders on disk, converters, names and the Hub."""

from cmap_defense.backbones.base import Backbone
from cmap_defense.backbones.convert import convert_jcm, convert_openai
from cmap_defense.backbones.folder import read_backbone, read_record, write_backbone
from cmap_defense.backbones.karras import ConsistencyBackbone, EDMDenoiser, NoiseRange
from cmap_defense.backbones.load import load_backbone
from cmap_defense.backbones.ncsnpp import NCSNpp, NCSNppConfig
from cmap_defense.backbones.networks import NETWORKS, Network
from cmap_defense.backbones.record import BackboneRecord
from cmap_defense.backbones.registry import (
    HubRepository,
    LocalFolder,
    OfficialFile,
    RegistryEntry,
    backbone_names,
    register,
    registry_entry,
)
from cmap_defense.backbones.unet import CompactUNet, CompactUNetConfig
from cmap_defense.backbones.verify import Verification, push_backbone, verify_backbone

__all__ = [
    "NETWORKS",
    "Backbone",
    "BackboneRecord",
    "CompactUNet",
    "CompactUNetConfig",
    "ConsistencyBackbone",
    "EDMDenoiser",
    "HubRepository",
    "LocalFolder",
    "NCSNpp",
    "NCSNppConfig",
    "Network",
    "NoiseRange",
    "OfficialFile",
    "RegistryEntry",
    "Verification",
    "backbone_names",
    "convert_jcm",
    "convert_openai",
    "load_backbone",
    "push_backbone",
    "read_backbone",
    "read_record",
    "register",
    "registry_entry",
    "verify_backbone",
    "write_backbone",
]
