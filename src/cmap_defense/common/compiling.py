"""torch.compile for functions of a batch, with one shape each; what cannot be compiled runs as it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cmap_defense.errors import CompileWarning


class StepCompiler:
    """Compiles functions of images that are differentiated once. Copies and pickles of it start anew."""

    def __init__(self) -> None:
        self._compiled: dict[Callable[..., Tensor], Callable[..., Tensor]] = {}
        self._tried: set[Any] = set()
        self._failed = False

    def __call__(self, function: Callable[..., Tensor], size: int) -> Callable[..., Tensor]:
        """The function, compiled for batches of ``size`` at most; smaller ones are padded with their last image.

        It is one of tensors [M, ...] and others, to a tensor [M, ...] whose rows each depend on that row alone. Where
        the first forward and backward pass of a shape fails in the compiler, it warns once (``CompileWarning``), and
        the function is called as it is from then on.
        """

        def call(*given: Any) -> Tensor:
            if self._failed:
                return function(*given)
            compiled = self._compiled.setdefault(function, torch.compile(function, dynamic=False))
            count = len(given[0])
            padded = [_padded(value, count, size) for value in given]
            device = given[0].device.type
            shapes = tuple((v.shape, v.dtype) if isinstance(v, Tensor) else v for v in padded)
            place = (function, shapes, str(given[0].device), torch.is_autocast_enabled(device))
            if place not in self._tried:
                try:
                    _try(compiled, padded)
                except Exception as error:
                    found = function(*given)  # an error of its own is raised here
                    self._failed = True
                    reason = (str(error).strip() or "no message").splitlines()[0]
                    warnings.warn(
                        f"torch.compile failed, so that the loop runs without it ({type(error).__name__}: {reason}). "
                        "It needs a C++ compiler on a CPU and Triton on a GPU. compile=False gives the same result "
                        "without this warning.",
                        CompileWarning,
                        stacklevel=2,
                    )
                    return found
                self._tried.add(place)
            return compiled(*padded)[:count]

        return call

    def __deepcopy__(self, memo: dict[int, Any]) -> StepCompiler:
        return StepCompiler()

    def __reduce__(self) -> tuple[type[StepCompiler], tuple[()]]:
        return (StepCompiler, ())


def _padded(value: Any, count: int, size: int) -> Any:
    """A tensor [M, ...] as [size, ...]; anything else as it is."""
    if not isinstance(value, Tensor) or value.shape[:1] != (count,) or count >= size:
        return value
    return torch.cat([value, value[-1:].expand(size - count, *value.shape[1:])])


def _try(compiled: Callable[..., Tensor], given: list[Any]) -> None:
    """One forward and one backward pass, which compile both; the compiler's own warnings are not the user's."""
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        leaf = given[0].detach().requires_grad_()
        torch.autograd.grad(compiled(leaf, *given[1:]).sum(), leaf, allow_unused=True)
