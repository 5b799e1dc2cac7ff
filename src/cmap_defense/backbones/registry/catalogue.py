"""The backbones that have a name: the published consistency models, and those in the package.

Nothing here was fetched to write it. Commits are those that stand in public links to these repositories' newest files
(huggingface.co/REPOSITORY/tree/COMMIT); figures are those of the paper's tables. A source without a commit or a
checksum is marked as not verified wherever it is shown, and ``cmap-defense backbones verify NAME`` fills both in on the
user's machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cmap_defense.backbones.folder import read_record
from cmap_defense.backbones.registry.entry import HubRepository, LocalFolder, OfficialFile, RegistryEntry

EMBEDDED_BACKBONES = ("fashion-mnist-ct", "cifar10-ct-small", "fashion-mnist-edm", "cifar10-edm-small")
"""Backbones that ship with the package, folders of its assets."""

_ASSETS = Path(__file__).parents[2] / "assets"
_JCM = "https://openaipublic.blob.core.windows.net/consistency/jcm_checkpoints/"
_PAPER = "Consistency Models (Song et al. 2023), arXiv 2303.01469"
_IMAGENET = {"n_latents": 5, "iterations": 300, "eps": 1.6e-4, "ssim_weight": 0.5, "latent_weight": 1.28}
"""The released ImageNet-100 settings (the preset "imagenet100")."""


def catalogue() -> tuple[RegistryEntry, ...]:
    """All entries that come with the package."""
    return (*map(_embedded, EMBEDDED_BACKBONES), *_cifar10(), *_openai())


def _embedded(name: str) -> RegistryEntry:
    record = read_record(_ASSETS / name)
    alike = ("description", "kind", "image_shape", "licence", "paper", "settings", "presets")
    return RegistryEntry(
        name=name,
        sources=(LocalFolder(folder=_ASSETS / name),),
        quality=record.figures,
        notes="In the package: needs no network.",
        **{field: getattr(record, field) for field in alike},
    )


def _cifar10() -> list[RegistryEntry]:
    distillation, training = "Continuous-time consistency distillation", "Continuous-time consistency training"
    cd = "cifar10-continuous-cd"
    rows = [
        ("cd", "cd-lpips", 80, "Consistency distillation with LPIPS: the CIFAR-10 model of the CMAP paper."),
        ("cd-l2", "cd-l2", 80, "Consistency distillation with the squared l2 metric."),
        ("cd-l1", "cd-l1", 80, "Consistency distillation with the l1 metric."),
        ("ct", "ct-lpips", 74, "Consistency training with LPIPS, without a teacher."),
        ("cd-l2-continuous", f"{cd}-l2", 40, f"{distillation}, l2."),
        ("cd-l2-continuous-stopgrad", f"{cd}-l2-stopgrad", 40, f"{distillation}, l2 with stop-gradient."),
        ("cd-lpips-continuous-stopgrad", f"{cd}-lpips-stopgrad", 40, f"{distillation}, LPIPS with stop-gradient."),
        ("ct-l2-continuous", "continuous-ct-l2", 80, f"{training}, l2."),
        ("ct-lpips-continuous", "continuous-ct-lpips", 40, f"{training}, LPIPS."),
    ]
    files = [(name, f"{folder}/checkpoints/checkpoint_{n}", text) for name, folder, n, text in rows]
    quality = {"cd": _fid(3.55, 1, inception=9.48), "ct": _fid(8.70, 1, inception=8.49)}
    return [
        RegistryEntry(
            name=f"cifar10-{name}",
            description=description,
            sources=(OfficialFile(url=_JCM + path),),
            kind="denoiser" if name == "edm" else "consistency",
            image_shape=(3, 32, 32),
            licence="Apache-2.0 (repository); the model card asks for research use only",
            paper=_PAPER,
            quality=quality.get(name, {}),
            notes="NCSN++, 56.4 M parameters, unconditional. The official file is JAX's; it is converted once, "
            "locally.",
        )
        for name, path, description in [*files, ("edm", "edm_cifar10_ema", "The EDM teacher of the distilled models.")]
    ]


def _openai() -> list[RegistryEntry]:
    """The models on the Hub in the layout of diffusers: a community model of CIFAR-10, and OpenAI's."""
    demo = (
        "Its weights are a pickle, of which tensors alone are read. It was trained with scalings of its own: "
        "f(x, sigma_min) is x only up to 0.002 F. No figure of its quality is published."
    )
    text = "A community model of CIFAR-10 in diffusers format, small and quick to fetch (113 MB)."
    rows: list[tuple[Any, ...]] = [("cifar10-demo", 32, "consistency/cifar10-32-demo", None, None, text, demo)]
    imagenet = (
        "U-Net of 295.9 M parameters (1.2 GB), class-conditional: read about class_labels before trusting a figure. "
        "The CMAP paper trained an unconditional model instead, which is nowhere published."
    )
    lsun = "Unconditional. Its CMAP settings are those of ImageNet-100: nobody has tuned any for 256 x 256."
    models: dict[str, tuple[str | None, float | None]] = {
        "cd_imagenet64_l2": ("04420ad15cb35558fdda60e227206dd38174e971", None),
        "cd_imagenet64_lpips": ("6056b9c8f0d58ec79773caffcf74d220825055ae", 6.20),
        "ct_imagenet64": (None, 13.0),
        "cd_bedroom256_l2": (None, None),
        "cd_bedroom256_lpips": (None, 7.80),
        "ct_bedroom256": (None, 16.0),
        "cd_cat256_l2": ("7c669b18f3fc624aee6fc7b11dff728804f1d223", None),
        "cd_cat256_lpips": ("2b474f9ca5d893faa471ec6b96b2d003d0ad436a", 11.0),
        "ct_cat256": (None, 20.7),
    }
    for file, (commit, fid) in models.items():
        kind, data, metric = f"{file}_".split("_")[:3]
        small = data == "imagenet64"
        place = "ImageNet at 64 x 64" if small else f"LSUN {data.removesuffix('256')}s at 256 x 256"
        how = {
            "": "training, without a teacher",
            "l2": "distillation with the squared l2 metric" if small else "distillation, l2",
            "lpips": "distillation with LPIPS",
        }
        name = f"{data}-{kind}{'-lpips' if metric == 'lpips' else ''}"
        said = (f"{place}. Consistency {how[metric]}.", imagenet if small else lsun)
        rows.append((name, 64 if small else 256, f"openai/diffusers-{file}", commit, fid, *said))
    return [
        RegistryEntry(
            name=name,
            description=description,
            sources=(HubRepository(repo_id=repository, revision=commit),),
            image_shape=(3, side, side),
            num_classes=1000 if side == 64 else None,
            settings=_IMAGENET if side > 32 else {},
            licence="MIT",
            paper=_PAPER,
            quality={} if fid is None else _fid(fid, 2),
            notes=f"Needs the extra [diffusers]. {notes}",
        )
        for name, side, repository, commit, fid, description, notes in rows
    ]


def _fid(value: float, table: int, *, inception: float | None = None) -> dict[str, Any]:
    """The published quality of one-step samples."""
    figures: dict[str, Any] = {"FID of one-step samples": value}
    if inception is not None:
        figures["Inception score of one-step samples"] = inception
    return figures | {"cited from": f"arXiv 2303.01469, table {table}"}
