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

__all__ = ["CIFAR10_CD_REPOSITORY", "EMBEDDED_BACKBONES", "catalogue"]

CIFAR10_CD_REPOSITORY: HubRepository | None = None
"""This project's own converted cifar10-cd on the Hub, with its commit and checksum.

None until the project owns the name: an id that anybody could register is not trusted."""

EMBEDDED_BACKBONES = ("fashion-mnist-ct", "cifar10-ct-small", "fashion-mnist-edm", "cifar10-edm-small")
"""Backbones that ship with the package, folders of its assets."""

_ASSETS = Path(__file__).parents[2] / "assets"
_JCM = "https://openaipublic.blob.core.windows.net/consistency/jcm_checkpoints/"
_PAPER = "Consistency Models (Song et al. 2023), arXiv 2303.01469"
_JCM_LICENCE = "Apache-2.0 (repository); the model card asks for research use only"
_CITED = "arXiv 2303.01469, table"
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
        quality=record.figures,
        notes="In the package: needs no network.",
    )


def _cifar10() -> list[RegistryEntry]:
    rows = [
        (
            "cifar10-cd",
            "cd-lpips/checkpoints/checkpoint_80",
            "Consistency distillation with LPIPS: the CIFAR-10 model of the CMAP paper.",
            _fid(3.55, 1, inception=9.48),
        ),
        (
            "cifar10-cd-l2",
            "cd-l2/checkpoints/checkpoint_80",
            "Consistency distillation with the squared l2 metric.",
            {},
        ),
        ("cifar10-cd-l1", "cd-l1/checkpoints/checkpoint_80", "Consistency distillation with the l1 metric.", {}),
        (
            "cifar10-ct",
            "ct-lpips/checkpoints/checkpoint_74",
            "Consistency training with LPIPS, without a teacher.",
            _fid(8.70, 1, inception=8.49),
        ),
        (
            "cifar10-cd-l2-continuous",
            "cifar10-continuous-cd-l2/checkpoints/checkpoint_40",
            "Continuous-time consistency distillation, l2.",
            {},
        ),
        (
            "cifar10-cd-l2-continuous-stopgrad",
            "cifar10-continuous-cd-l2-stopgrad/checkpoints/checkpoint_40",
            "Continuous-time consistency distillation, l2 with stop-gradient.",
            {},
        ),
        (
            "cifar10-cd-lpips-continuous-stopgrad",
            "cifar10-continuous-cd-lpips-stopgrad/checkpoints/checkpoint_40",
            "Continuous-time consistency distillation, LPIPS with stop-gradient.",
            {},
        ),
        (
            "cifar10-ct-l2-continuous",
            "continuous-ct-l2/checkpoints/checkpoint_80",
            "Continuous-time consistency training, l2.",
            {},
        ),
        (
            "cifar10-ct-lpips-continuous",
            "continuous-ct-lpips/checkpoints/checkpoint_40",
            "Continuous-time consistency training, LPIPS.",
            {},
        ),
    ]
    entries = []
    for name, file, description, quality in rows:
        sources: tuple[Source, ...] = (OfficialFile(url=_JCM + file),)
        if name == "cifar10-cd" and CIFAR10_CD_REPOSITORY is not None:
            sources = (CIFAR10_CD_REPOSITORY, *sources)
        entries.append(_cifar10_entry(name, description, sources, quality=quality))
    teacher = (OfficialFile(url=_JCM + "edm_cifar10_ema"),)
    return [
        *entries,
        _cifar10_entry("cifar10-edm", "The EDM teacher of the distilled models.", teacher, kind="denoiser"),
    ]


def _cifar10_entry(name: str, description: str, sources: tuple[Source, ...], **others: Any) -> RegistryEntry:
    return RegistryEntry(
        name=name,
        description=description,
        sources=sources,
        image_shape=(3, 32, 32),
        licence=_JCM_LICENCE,
        paper=_PAPER,
        notes="NCSN++, 56.4 M parameters, unconditional. The official file is JAX's; it is converted once, locally.",
        **others,
    )


def _cifar10_demo() -> RegistryEntry:
    return RegistryEntry(
        name="cifar10-demo",
        description="A community model of CIFAR-10 in diffusers format, small and quick to fetch (113 MB).",
        sources=(HubRepository(repo_id="consistency/cifar10-32-demo"),),
        image_shape=(3, 32, 32),
        licence="MIT",
        paper=_PAPER,
        notes=(
            "Needs the extra [diffusers]. Its weights are a pickle, of which tensors alone are read. It was trained "
            "with scalings of its own: f(x, sigma_min) is x only up to 0.002 F. No figure of its quality is published."
        ),
    )


def _imagenet64() -> list[RegistryEntry]:
    rows = [
        (
            "imagenet64-cd",
            HubRepository(
                repo_id="openai/diffusers-cd_imagenet64_l2", revision="04420ad15cb35558fdda60e227206dd38174e971"
            ),
            "Consistency distillation with the squared l2 metric.",
            {},
        ),
        (
            "imagenet64-cd-lpips",
            HubRepository(
                repo_id="openai/diffusers-cd_imagenet64_lpips", revision="6056b9c8f0d58ec79773caffcf74d220825055ae"
            ),
            "Consistency distillation with LPIPS.",
            _fid(6.20, 2),
        ),
        (
            "imagenet64-ct",
            HubRepository(repo_id="openai/diffusers-ct_imagenet64"),
            "Consistency training, without a teacher.",
            _fid(13.0, 2),
        ),
    ]
    return [
        RegistryEntry(
            name=name,
            description=f"ImageNet at 64 x 64. {description}",
            sources=(source,),
            image_shape=(3, 64, 64),
            num_classes=1000,
            licence="MIT",
            paper=_PAPER,
            settings=_IMAGENET,
            quality=quality,
            notes=(
                "Needs the extra [diffusers]. U-Net of 295.9 M parameters (1.2 GB), class-conditional: read about "
                "class_labels before trusting a figure. The CMAP paper trained an unconditional model instead, which "
                "is nowhere published."
            ),
        )
        for name, source, description, quality in rows
    ]


def _lsun(subject: str) -> list[RegistryEntry]:
    cat = subject == "cat"
    rows = [
        ("cd", "cd_{}256_l2", "7c669b18f3fc624aee6fc7b11dff728804f1d223" if cat else None, "distillation, l2", {}),
        (
            "cd-lpips",
            "cd_{}256_lpips",
            "2b474f9ca5d893faa471ec6b96b2d003d0ad436a" if cat else None,
            "distillation with LPIPS",
            _fid(11.0 if cat else 7.80, 2),
        ),
        ("ct", "ct_{}256", None, "training, without a teacher", _fid(20.7 if cat else 16.0, 2)),
    ]
    return [
        RegistryEntry(
            name=f"{subject}256-{suffix}",
            description=f"LSUN {subject}s at 256 x 256. Consistency {description}.",
            sources=(HubRepository(repo_id=f"openai/diffusers-{file.format(subject)}", revision=revision),),
            image_shape=(3, 256, 256),
            licence="MIT",
            paper=_PAPER,
            settings=_IMAGENET,
            quality=quality,
            notes=(
                "Needs the extra [diffusers]. Unconditional. Its CMAP settings are those of ImageNet-100: nobody has "
                "tuned any for 256 x 256."
            ),
        )
        for suffix, file, revision, description, quality in rows
    ]


def _fid(value: float, table: int, *, inception: float | None = None) -> dict[str, Any]:
    """The published quality of one-step samples."""
    figures: dict[str, Any] = {"FID of one-step samples": value}
    if inception is not None:
        figures["Inception score of one-step samples"] = inception
    return figures | {"cited from": f"{_CITED} {table}"}
