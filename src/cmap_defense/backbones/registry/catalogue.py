"""The backbones that have a name: the published consistency models, and the two in the package.

Nothing here was fetched to write it. Commits are those that stand in public links to these repositories' newest files
(huggingface.co/REPOSITORY/tree/COMMIT); figures are those of the paper's tables. A source without a commit or a
checksum is marked as not verified wherever it is shown, and ``cmap-defense backbones verify NAME`` fills both in on the
user's machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cmap_defense.backbones.folder import read_record
from cmap_defense.backbones.registry.entry import (
    HubRepository,
    LocalFolder,
    OfficialFile,
    RegistryEntry,
    Source,
)

CIFAR10_CD_REPOSITORY: HubRepository | None = None
"""This project's own converted cifar10-cd on the Hub, with its commit and checksum.

None until the project owns the name: an id that anybody could register is not trusted."""

EMBEDDED_BACKBONES = ("fashion-mnist-ct", "cifar10-ct-small", "fashion-mnist-edm", "cifar10-edm-small")
"""Backbones that ship with the package, folders of its assets."""

_ASSETS = Path(__file__).parents[2] / "assets"
_JCM = "https://openaipublic.blob.core.windows.net/consistency/jcm_checkpoints/"
_PAPER = "Consistency Models (Song et al. 2023), arXiv 2303.01469"
_IMAGENET: dict[str, Any] = {
    "n_latents": 5,
    "iterations": 300,
    "eps": 1.6e-4,
    "ssim_weight": 0.5,
    "latent_weight": 1.28,
}
"""The released ImageNet-100 settings (the preset "imagenet100")."""


def catalogue() -> tuple[RegistryEntry, ...]:
    """All entries that come with the package."""
    embedded = (_embedded(name) for name in EMBEDDED_BACKBONES)
    return (*embedded, *_cifar10(), _cifar10_demo(), *_imagenet64(), *_lsun("bedroom"), *_lsun("cat"))


def _embedded(name: str) -> RegistryEntry:
    folder = _ASSETS / name
    record = read_record(folder)
    return RegistryEntry(
        name=name,
        description=record.description,
        sources=(LocalFolder(folder=folder),),
        kind=record.kind,
        image_shape=record.image_shape,
        licence=record.licence,
        paper=record.paper,
        settings=record.settings,
        presets=record.presets,
        quality=record.figures,
        notes="In the package: needs no network.",
    )


def _cifar10() -> list[RegistryEntry]:
    rows = [
        ("cifar10-cd", "cd-lpips", 80, "Consistency distillation with LPIPS: the CIFAR-10 model of the CMAP paper."),
        ("cifar10-cd-l2", "cd-l2", 80, "Consistency distillation with the squared l2 metric."),
        ("cifar10-cd-l1", "cd-l1", 80, "Consistency distillation with the l1 metric."),
        ("cifar10-ct", "ct-lpips", 74, "Consistency training with LPIPS, without a teacher."),
        ("cifar10-cd-l2-continuous", "cifar10-continuous-cd-l2", 40, "Continuous-time consistency distillation, l2."),
        (
            "cifar10-cd-l2-continuous-stopgrad",
            "cifar10-continuous-cd-l2-stopgrad",
            40,
            "Continuous-time consistency distillation, l2 with stop-gradient.",
        ),
        (
            "cifar10-cd-lpips-continuous-stopgrad",
            "cifar10-continuous-cd-lpips-stopgrad",
            40,
            "Continuous-time consistency distillation, LPIPS with stop-gradient.",
        ),
        ("cifar10-ct-l2-continuous", "continuous-ct-l2", 80, "Continuous-time consistency training, l2."),
        ("cifar10-ct-lpips-continuous", "continuous-ct-lpips", 40, "Continuous-time consistency training, LPIPS."),
    ]
    quality = {"cifar10-cd": _fid(3.55, 1, inception=9.48), "cifar10-ct": _fid(8.70, 1, inception=8.49)}
    own: dict[str, tuple[Source, ...]] = {"cifar10-cd": (CIFAR10_CD_REPOSITORY,)} if CIFAR10_CD_REPOSITORY else {}
    notes = "NCSN++, 56.4 M parameters, unconditional. The official file is JAX's; it is converted once, locally."
    teacher = ("cifar10-edm", f"{_JCM}edm_cifar10_ema", "The EDM teacher of the distilled models.")
    files = [(name, f"{_JCM}{folder}/checkpoints/checkpoint_{n}", text) for name, folder, n, text in rows]
    return [
        RegistryEntry(
            name=name,
            description=description,
            sources=(*own.get(name, ()), OfficialFile(url=url)),
            kind="denoiser" if name == "cifar10-edm" else "consistency",
            image_shape=(3, 32, 32),
            licence="Apache-2.0 (repository); the model card asks for research use only",
            paper=_PAPER,
            quality=quality.get(name, {}),
            notes=notes,
        )
        for name, url, description in [*files, teacher]
    ]


def _hub_entry(
    name: str, side: int, description: str, repository: str, revision: str | None, notes: str, **fields: Any
) -> RegistryEntry:
    return RegistryEntry(
        name=name,
        description=description,
        sources=(HubRepository(repo_id=repository, revision=revision),),
        image_shape=(3, side, side),
        licence="MIT",
        paper=_PAPER,
        notes=f"Needs the extra [diffusers]. {notes}",
        **fields,
    )


def _cifar10_demo() -> RegistryEntry:
    return _hub_entry(
        "cifar10-demo",
        32,
        "A community model of CIFAR-10 in diffusers format, small and quick to fetch (113 MB).",
        "consistency/cifar10-32-demo",
        None,
        "Its weights are a pickle, of which tensors alone are read. It was trained with scalings of its own: "
        "f(x, sigma_min) is x only up to 0.002 F. No figure of its quality is published.",
    )


def _imagenet64() -> list[RegistryEntry]:
    rows = [
        ("cd", "cd_imagenet64_l2", "04420ad15cb35558fdda60e227206dd38174e971", {}),
        ("cd-lpips", "cd_imagenet64_lpips", "6056b9c8f0d58ec79773caffcf74d220825055ae", _fid(6.20, 2)),
        ("ct", "ct_imagenet64", None, _fid(13.0, 2)),
    ]
    descriptions = {
        "cd": "Consistency distillation with the squared l2 metric.",
        "cd-lpips": "Consistency distillation with LPIPS.",
        "ct": "Consistency training, without a teacher.",
    }
    notes = (
        "U-Net of 295.9 M parameters (1.2 GB), class-conditional: read about class_labels before trusting a figure. "
        "The CMAP paper trained an unconditional model instead, which is nowhere published."
    )
    return [
        _hub_entry(
            f"imagenet64-{suffix}",
            64,
            f"ImageNet at 64 x 64. {descriptions[suffix]}",
            f"openai/diffusers-{file}",
            revision,
            notes,
            num_classes=1000,
            settings=_IMAGENET,
            quality=quality,
        )
        for suffix, file, revision, quality in rows
    ]


def _lsun(motif: str) -> list[RegistryEntry]:
    cat = motif == "cat"
    rows = [
        ("cd", "distillation, l2", "7c669b18f3fc624aee6fc7b11dff728804f1d223" if cat else None, {}),
        (
            "cd-lpips",
            "distillation with LPIPS",
            "2b474f9ca5d893faa471ec6b96b2d003d0ad436a" if cat else None,
            _fid(11.0 if cat else 7.80, 2),
        ),
        ("ct", "training, without a teacher", None, _fid(20.7 if cat else 16.0, 2)),
    ]
    files = {"cd": f"cd_{motif}256_l2", "cd-lpips": f"cd_{motif}256_lpips", "ct": f"ct_{motif}256"}
    notes = "Unconditional. Its CMAP settings are those of ImageNet-100: nobody has tuned any for 256 x 256."
    return [
        _hub_entry(
            f"{motif}256-{suffix}",
            256,
            f"LSUN {motif}s at 256 x 256. Consistency {description}.",
            f"openai/diffusers-{files[suffix]}",
            revision,
            notes,
            settings=_IMAGENET,
            quality=quality,
        )
        for suffix, description, revision, quality in rows
    ]


def _fid(value: float, table: int, *, inception: float | None = None) -> dict[str, Any]:
    """The published quality of one-step samples."""
    figures: dict[str, Any] = {"FID of one-step samples": value}
    if inception is not None:
        figures["Inception score of one-step samples"] = inception
    return figures | {"cited from": f"arXiv 2303.01469, table {table}"}
