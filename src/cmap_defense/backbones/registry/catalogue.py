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
    rows = [
        ("cd", "cd-lpips", 80, "Consistency distillation with LPIPS: the CIFAR-10 model of the CMAP paper."),
        ("cd-l2", "cd-l2", 80, "Consistency distillation with the squared l2 metric."),
        ("cd-l1", "cd-l1", 80, "Consistency distillation with the l1 metric."),
        ("ct", "ct-lpips", 74, "Consistency training with LPIPS, without a teacher."),
        ("cd-l2-continuous", "cifar10-continuous-cd-l2", 40, f"{distillation}, l2."),
        *(
            (f"cd-{short}-continuous-stopgrad", f"cifar10-continuous-cd-{short}-stopgrad", 40, f"{distillation}, {text}.")
            for short, text in (("l2", "l2 with stop-gradient"), ("lpips", "LPIPS with stop-gradient"))
        ),
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
            notes="NCSN++, 56.4 M parameters, unconditional. The official file is JAX's; it is converted once, locally.",
        )
        for name, path, description in [*files, ("edm", "edm_cifar10_ema", "The EDM teacher of the distilled models.")]
    ]


def _openai() -> list[RegistryEntry]:
    """The models on the Hub in the layout of diffusers: OpenAI's, and a community model of CIFAR-10."""
    demo = {
        "notes": "Its weights are a pickle, of which tensors alone are read. It was trained with scalings of its own: "
        "f(x, sigma_min) is x only up to 0.002 F. No figure of its quality is published."
    }
    imagenet = {
        "num_classes": 1000,
        "settings": _IMAGENET,
        "notes": "U-Net of 295.9 M parameters (1.2 GB), class-conditional: read about class_labels before trusting a "
        "figure. The CMAP paper trained an unconditional model instead, which is nowhere published.",
    }
    lsun = {
        "settings": _IMAGENET,
        "notes": "Unconditional. Its CMAP settings are those of ImageNet-100: nobody has tuned any for 256 x 256.",
    }
    kinds = {
        "cd": ("l2", "distillation with the squared l2 metric", "distillation, l2"),
        "cd-lpips": ("lpips", "distillation with LPIPS", "distillation with LPIPS"),
        "ct": ("", "training, without a teacher", "training, without a teacher"),
    }
    commits = {
        "cd_imagenet64_l2": "04420ad15cb35558fdda60e227206dd38174e971",
        "cd_imagenet64_lpips": "6056b9c8f0d58ec79773caffcf74d220825055ae",
        "cd_cat256_l2": "7c669b18f3fc624aee6fc7b11dff728804f1d223",
        "cd_cat256_lpips": "2b474f9ca5d893faa471ec6b96b2d003d0ad436a",
    }
    fids = {
        "cd_imagenet64_lpips": 6.20,
        "ct_imagenet64": 13.0,
        "cd_bedroom256_lpips": 7.80,
        "ct_bedroom256": 16.0,
        "cd_cat256_lpips": 11.0,
        "ct_cat256": 20.7,
    }
    text = "A community model of CIFAR-10 in diffusers format, small and quick to fetch (113 MB)."
    rows: list[tuple[str, str, str, dict[str, Any]]] = [("cifar10-demo", "consistency/cifar10-32-demo", text, demo)]
    for data in ("imagenet64", "bedroom256", "cat256"):
        for suffix, (metric, long, short) in kinds.items():
            file = "_".join(filter(None, (suffix[:2], data, metric)))
            text = f"ImageNet at 64 x 64. Consistency {long}."
            if data != "imagenet64":
                text = f"LSUN {data.removesuffix('256')}s at 256 x 256. Consistency {short}."
            fields = dict(imagenet if data == "imagenet64" else lsun)
            if file in fids:
                fields["quality"] = _fid(fids[file], 2)
            rows.append((f"{data}-{suffix}", f"openai/diffusers-{file}", text, fields))
    sides = {"cifar10": 32, "imagenet64": 64, "bedroom256": 256, "cat256": 256}
    return [
        RegistryEntry(
            name=name,
            description=description,
            sources=(HubRepository(repo_id=repository, revision=commits.get(repository.partition("-")[2])),),
            image_shape=(3, sides[name.partition("-")[0]], sides[name.partition("-")[0]]),
            licence="MIT",
            paper=_PAPER,
            **fields | {"notes": f"Needs the extra [diffusers]. {fields['notes']}"},
        )
        for name, repository, description, fields in rows
    ]


def _fid(value: float, table: int, *, inception: float | None = None) -> dict[str, Any]:
    """The published quality of one-step samples."""
    figures: dict[str, Any] = {"FID of one-step samples": value}
    if inception is not None:
        figures["Inception score of one-step samples"] = inception
    return figures | {"cited from": f"arXiv 2303.01469, table {table}"}
