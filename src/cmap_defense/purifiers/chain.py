"""Purifiers one after the other."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from cmap_defense.cmap.unroll import Backward
from cmap_defense.common.rng import derived_seeds
from cmap_defense.common.settings import Settings, near_matches, require_choice
from cmap_defense.errors import InputValueError, SettingsError, UnknownNameError, WrongKindError
from cmap_defense.purifiers.base import Purifier, check_purified, check_purifier
from cmap_defense.purifiers.cmap import CMAP
from cmap_defense.purifiers.diffpure import DiffPure
from cmap_defense.purifiers.pair import BackbonePair
from cmap_defense.results import PurificationResult

__all__ = ["Chain"]

STREAM = 0xC4A1
"""Makes the noise of later purifiers independent of that of the first."""

SHARED = ("callback", "max_parallel")
"""Arguments that every purifier of a chain is given."""

Apply = Callable[..., PurificationResult]
"""How one purifier of a chain is carried out: its call, or its call with a gradient."""


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class Chain(Settings, Purifier):
    """The purified images of one purifier are the inputs of the next (arXiv 2412.08394, Tab. IV).

    ``Chain(DiffPure(t=100), CMAP())`` denoises an image and then restores the result. Backbones of two kinds are given
    to the wrapper as a pair. The noise of the first purifier is that of the seeds; each later one has seeds derived
    from the image's, one for each version that is handed on. The gradient composes those of the purifiers; through
    CMAP it is the unrolled one.

    Args:
        purifiers: one or more, in order.
        handed_on: "versions": each of the K purified versions is purified by the next, so that the vote is over the
            product of all K. "mean": their mean is, and the vote is over the K of the last.

    Raises:
        SettingsError: there is no purifier, or something else among them.
    """

    needs: ClassVar[str | None] = None
    _advice: ClassVar[Mapping[str, str]] = {
        "purifiers": "Give them one by one, without a name: Chain(DiffPure(t=100), CMAP())."
    }
    _presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: {"purifiers": (DiffPure.preset(name), CMAP.preset(name))} for name in ("cifar10-linf", "cifar10-l2")
    }

    purifiers: tuple[Purifier, ...]
    handed_on: str = "versions"

    def __init__(self, *purifiers: Purifier, handed_on: str = "versions") -> None:
        if len(purifiers) == 1 and isinstance(purifiers[0], (list, tuple)):
            raise SettingsError(
                "A Chain takes its purifiers one by one: Chain(DiffPure(t=100), CMAP()), without a list."
            )
        if not purifiers or not all(isinstance(purifier, Purifier) for purifier in purifiers):
            raise SettingsError(
                f"A Chain is made of purifiers, such as Chain(DiffPure(t=100), CMAP()), but got {purifiers!r}. As "
                "text: purifiers=(diffpure t=100, cmap)."
            )
        object.__setattr__(self, "purifiers", tuple(map(check_purifier, purifiers)))
        object.__setattr__(self, "handed_on", require_choice("Chain", "handed_on", handed_on, ("versions", "mean")))

    @property
    def kind(self) -> str | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The kind that its purifiers need; None where they need both, or none in particular."""
        kinds = {purifier.kind for purifier in self.purifiers} - {None}
        return kinds.pop() if len(kinds) == 1 else None

    @property
    def n_latents(self) -> int:
        return self._versions(len(self.purifiers) - 1) * self.purifiers[-1].n_latents

    @property
    def passes(self) -> int:
        return sum(self._versions(n) * purifier.passes for n, purifier in enumerate(self.purifiers))

    @property
    def involves_latents(self) -> bool:
        return any(purifier.involves_latents for purifier in self.purifiers)

    @property
    def call_options(self) -> frozenset[str]:
        return frozenset().union(*(purifier.call_options for purifier in self.purifiers))

    def member(self, backbone: nn.Module) -> nn.Module:
        """The backbone, or the pair: each purifier takes its own."""
        return backbone

    def check(self, backbone: nn.Module) -> None:
        try:
            for purifier in self.purifiers:
                purifier.check(backbone)
        except WrongKindError as error:
            if isinstance(backbone, BackbonePair) or self.kind is not None:
                raise
            raise WrongKindError(
                f"{error} Purifiers of a chain that need different kinds take a pair: backbone=(consistency, "
                "denoiser), on the command line --backbone twice."
            ) from error

    def fitting(self, backbone: nn.Module, image_shape: Sequence[int], device: torch.device) -> int:
        """What fits for each of its purifiers."""
        return min(purifier.fitting(backbone, image_shape, device) for purifier in self.purifiers)

    def sample(self, backbone: nn.Module, image_shape: Sequence[int], device: torch.device) -> Tensor:
        """Those of its purifiers, [N, C, H, W]."""
        return torch.cat([purifier.sample(backbone, image_shape, device) for purifier in self.purifiers])

    def __call__(self, backbone: nn.Module, images: Tensor, **options: Any) -> PurificationResult:
        """Purify images; differentiable.

        Args:
            backbone: as for ``Purifier``.
            images: likewise.
            options: likewise. ``latents`` must be None, since the noise of every purifier is drawn from the seeds;
                ``callback`` is handed to every purifier.

        Returns:
            The result of the last purifier. Its history is there where it purified one image for each of the inputs.

        Raises:
            InputValueError: latents were given.
        """
        if torch.is_grad_enabled() and images.requires_grad:
            return self.differentiate(backbone, images, backward=Backward(), **options)
        return self._run(backbone, images, lambda purifier, *given, **named: purifier(*given, **named), **options)

    def differentiate(
        self, backbone: nn.Module, images: Tensor, *, backward: Backward, **options: Any
    ) -> PurificationResult:
        def apply(purifier: Purifier, *given: Any, **named: Any) -> PurificationResult:
            return purifier.differentiate(*given, backward=backward, **named)

        return self._run(backbone, images, apply, **options)

    def _run(
        self,
        backbone: nn.Module,
        images: Tensor,
        apply: Apply,
        *,
        seeds: Tensor,
        latents: Tensor | None = None,
        class_labels: Tensor | None = None,
        **options: Any,
    ) -> PurificationResult:
        if latents is not None:
            raise InputValueError("A Chain draws the noise of each purifier from the seeds: leave latents out.")
        self.check(backbone)
        count, current = len(images), images
        results: list[PurificationResult] = []
        for n, purifier in enumerate(self.purifiers):
            if results and self.handed_on == "mean":
                current = results[-1].images.mean(dim=1)
            elif results:
                current = results[-1].images.flatten(0, 1)
            labels = self._labels(purifier, backbone, class_labels, n)
            first = n == 0 and not isinstance(purifier, Chain)  # which would derive the seeds of this chain again
            given = seeds if first else _seeds_of(seeds, n, self._versions(n))
            own = {name: value for name, value in options.items() if name in {*SHARED, *purifier.call_options}}
            found = apply(purifier, backbone, current, seeds=given, class_labels=labels, **own)
            results.append(check_purified(found, current, purifier.n_latents, type(purifier).__name__))
        last, shape = results[-1], (count, self.n_latents)
        return dataclasses.replace(
            last,
            images=last.images.flatten(0, 1).unflatten(0, shape),
            latents=last.latents.flatten(0, 1).unflatten(0, shape),
            history=last.history if len(last.images) == count else None,
            seeds=seeds,
            class_labels=class_labels,
            passes=self._made(results, count),
            iterations=last.iterations if len(last.images) == count else None,
        )

    def _made(self, results: list[PurificationResult], count: int) -> Tensor | None:
        """Network passes of each image [B]; None where no purifier counted them."""
        if all(result.passes is None for result in results):
            return None
        made = torch.zeros(count, dtype=torch.int64, device="cpu")
        for n, (purifier, result) in enumerate(zip(self.purifiers, results, strict=True)):
            versions = self._versions(n)
            made += versions * purifier.passes if result.passes is None else result.passes.view(count, -1).sum(dim=1)
        return made

    def _versions(self, n: int) -> int:
        """Images that the purifier at place n purifies for each input."""
        return 1 if self.handed_on == "mean" else math.prod(purifier.n_latents for purifier in self.purifiers[:n])

    def _labels(self, purifier: Purifier, backbone: nn.Module, labels: Tensor | None, n: int) -> Tensor | None:
        """The class labels [B versions, K] of a purifier, of those [B, K of the chain] of the images voted on."""
        if labels is None or getattr(purifier.member(backbone), "num_classes", None) is None:
            return None
        if self.handed_on == "mean":
            return labels[:, torch.arange(purifier.n_latents, device=labels.device) % labels.shape[1]]
        return labels.unflatten(1, (self._versions(n), purifier.n_latents, -1))[..., 0].flatten(0, 1)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A chain from a mapping of its fields.

        Args:
            values: "handed_on", and "purifiers": objects, settings with "purifier": name, and texts such as
                "diffpure t=60"; or one text of several, such as "diffpure t=60, cmap level=0.5".

        Raises:
            SettingsError: they do not fit; the message says which purifier it is about.
            UnknownNameError: there is no purifier of a name; likewise.
        """
        from cmap_defense.purifiers.names import parts_of

        known = ("purifiers", "handed_on")
        if not isinstance(values, Mapping):
            raise SettingsError(f"Chain is made from a mapping of its fields, but got {type(values).__name__}.")
        for name in values:
            if name not in known:
                raise SettingsError(
                    f"Chain has no setting {name!r}.{near_matches(str(name), known)} Settings of its purifiers follow "
                    "their names: purifiers=(diffpure t=60, cmap)."
                )
        given = values.get("purifiers", ())
        given = parts_of(given) if isinstance(given, str) else given
        parts = list(given) if isinstance(given, Iterable) else [given]
        made = [_part(number, part, parts) for number, part in enumerate(parts, start=1)]
        return cls(*made, **({"handed_on": values["handed_on"]} if "handed_on" in values else {}))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values; a purifier that has no name stands by its class."""
        from cmap_defense.purifiers.names import name_of

        parts: list[dict[str, Any]] = []
        for purifier in self.purifiers:
            try:
                named = {"purifier": name_of(purifier)}
            except UnknownNameError:
                named = {}
            parts.append(named | purifier.to_dict())
        return {"purifiers": parts, "handed_on": self.handed_on}

    def to_json(self, *, indent: int | None = None) -> str:
        """The fields as a JSON object, each purifier by its name with its settings.

        Raises:
            SettingsError: a purifier is not one of the package, so that it has no name.
        """
        from cmap_defense.purifiers.names import name_of

        try:
            parts = [{"purifier": name_of(purifier), **purifier.to_dict()} for purifier in self.purifiers]
        except UnknownNameError as error:
            raise SettingsError(f"{error} A chain with it cannot be written as JSON.") from error
        return json.dumps({"purifiers": parts, "handed_on": self.handed_on}, indent=indent)

    def __repr__(self) -> str:
        return f"Chain({', '.join(map(repr, self.purifiers))}, handed_on={self.handed_on!r})"


def _part(number: int, given: Any, parts: Sequence[Any]) -> Any:
    """Purifier ``number`` of a chain from its text or its settings; anything else as it is."""
    from cmap_defense.purifiers.names import from_texts, purifier_from_dict, words_of

    try:
        if isinstance(given, str):
            name, *settings = words_of(given) or [""]
            return from_texts(name, settings)
        return purifier_from_dict(given) if isinstance(given, Mapping) else given
    except (SettingsError, UnknownNameError) as error:
        near = [part for part in parts[number - 1 : number + 1] if isinstance(part, str) and part]
        comma = any(not part[0].isalpha() for part in near)  # the rest of a value that was split
        remedy = " A value with commas needs brackets: gnsp rounds=(30,50)." if comma else ""
        raise type(error)(f"Purifier {number} of the chain, {given!r}: {error}{remedy}") from error


def _seeds_of(seeds: Tensor, n: int, versions: int) -> Tensor:
    """[B versions] seeds of the purifier at place n, for each version of each image."""
    own = derived_seeds(seeds, STREAM + n)
    return torch.stack([derived_seeds(own, version) for version in range(versions)], dim=1).flatten()
