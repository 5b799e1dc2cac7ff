"""Functions that watch, and may steer, the latent optimisation."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

from typing_extensions import Self

from cmap_defense.errors import InputValueError

__all__ = ["HookHandle", "LatentHook", "LatentHooks", "together"]


@dataclasses.dataclass(frozen=True)
class LatentHook:
    """A function that is called during the optimisation over latents.

    Attributes:
        function: what is called with a ``LatentState``.
        iterations: those at which it is called; None for all.
        live: whether it is given states that are part of the graph.
    """

    function: Callable[[Any], Any]
    iterations: Container[int] | None = None
    live: bool = False

    def at(self, iteration: int) -> bool:
        """Whether it is called at an iteration."""
        return self.iterations is None or iteration in self.iterations


class HookHandle:
    """Removes its hook: by ``remove``, or at the end of a ``with`` block, also on an exception."""

    def __init__(self, hooks: dict[int, Any], key: int) -> None:
        self._hooks, self._key = hooks, key

    def remove(self) -> None:
        """Take the hook out; a second call does nothing."""
        self._hooks.pop(self._key, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class LatentHooks:
    """An ordered set of hooks that belongs to one object: copies and pickles of it start empty."""

    def __init__(self) -> None:
        self._hooks: dict[int, LatentHook] = {}
        self._keys = itertools.count()

    def register(
        self, function: Callable[[Any], Any], iterations: Container[int] | None = None, live: bool = False
    ) -> HookHandle:
        """Add a hook behind the others."""
        key = next(self._keys)
        self._hooks[key] = LatentHook(function, iterations, live)
        return HookHandle(self._hooks, key)

    def __iter__(self) -> Iterator[LatentHook]:
        return iter(tuple(self._hooks.values()))

    def __len__(self) -> int:
        return len(self._hooks)

    def __deepcopy__(self, memo: dict[int, Any]) -> LatentHooks:
        return LatentHooks()

    def __reduce__(self) -> tuple[type[LatentHooks], tuple[()]]:
        return (LatentHooks, ())


def together(hooks: Sequence[LatentHook]) -> Callable[[Any], Any] | None:
    """Several hooks as one function, each called at its own iterations; None when there are none.

    It raises ``InputValueError`` when more than one hook replaces the latents of an iteration.
    """
    if not hooks:
        return None

    def run(state: Any) -> Any:
        returned = [hook.function(state) for hook in hooks if hook.at(state.iteration)]
        replaced = [latents for latents in returned if latents is not None]
        if len(replaced) > 1:
            raise InputValueError(f"{len(replaced)} latent hooks replaced the latents of one iteration; only one may.")
        return replaced[0] if replaced else None

    return run
