"""Functions that watch, and may steer, the latent optimisation."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

from torch.utils.hooks import RemovableHandle

from cmap_defense.errors import InputValueError


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


class LatentHooks:
    """An ordered set of hooks that belongs to one object: copies and pickles of it start empty."""

    def __init__(self) -> None:
        self._hooks: OrderedDict[int, LatentHook] = OrderedDict()

    def register(
        self, function: Callable[[Any], Any], iterations: Container[int] | None = None, live: bool = False
    ) -> RemovableHandle:
        """Add a hook behind the others. The handle removes it, also at the end of a ``with`` block."""
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = LatentHook(function, iterations, live)
        return handle

    def __iter__(self) -> Iterator[LatentHook]:
        return iter(tuple(self._hooks.values()))

    def __len__(self) -> int:
        return len(self._hooks)

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
