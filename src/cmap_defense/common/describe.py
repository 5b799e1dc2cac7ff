"""What attacks, purifiers and models are made of, as JSON: settings by name, networks by class and checksum."""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import functools
import hashlib
import inspect
import math
import re
from collections.abc import Collection, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

import numpy as np
from torch import Tensor, nn

from cmap_defense.common.files import tensor_checksum
from cmap_defense.common.modules import dtype_of, module_behind
from cmap_defense.common.options import NamedOptions

_STANDARD = {"abc", "builtins", "collections", "dataclasses", "enum", "functools", "typing"}
"""Modules of Python whose classes other classes extend."""

_PLAIN = (bool, int, float, complex, str, bytes, tuple, list, dict, set, frozenset, type(None))
_MUTABLE = (list, dict, set)

_MAKERS = ("__init__", "__post_init__", "__new__", "__setstate__")
"""Methods that set what an object is made with."""

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def describe(part: object) -> Any:
    """Settings as JSON: a dataclass by its fields, another object with options by these, a network as
    ``describe_module``, a tensor by its checksum, a method of a network or a partial of one with that network, another
    function by its name and code and the networks, tensors and plain values that it encloses, anything else as its repr
    without its address in memory."""
    if isinstance(part, nn.Module):
        return describe_module(part)
    if isinstance(part, (Tensor, np.ndarray)):
        return {"shape": list(part.shape), "values": _values_checksum(part)}
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = {field.name: describe(getattr(part, field.name)) for field in dataclasses.fields(part)}
        options = _options(part, fields) if isinstance(part, NamedOptions) else {}
        return {"class": type(part).__name__, **fields, **options, **own_code(part)}
    if isinstance(part, (list, tuple)):
        return [describe(value) for value in part]
    if isinstance(part, (set, frozenset)):
        return sorted((describe(value) for value in part), key=repr)
    if isinstance(part, dict):
        return {str(name): describe(value) for name, value in part.items()}
    if part is None or isinstance(part, (bool, int, str)) or (isinstance(part, float) and math.isfinite(part)):
        return part
    if isinstance(part, NamedOptions):
        return {"class": type(part).__name__, **_options(part), **own_code(part)}
    module = module_behind(part)
    if module is not None:
        return {"function": qualified_name(getattr(part, "func", part)), **describe_module(module)}
    if hasattr(part, "__qualname__"):
        code = own_code(part)
        return {"function": qualified_name(part), **code, **_enclosed(part)} if code else qualified_name(part)
    if isinstance(part, functools.partial):
        keywords = {name: describe(value) for name, value in part.keywords.items()}
        return {"partial": describe(part.func), "given": describe(part.args), **keywords}
    code = own_code(part)
    if code:
        return {"class": qualified_name(part), **code, **{name: describe(value) for name, value in _held(part).items()}}
    return ADDRESS.sub("", repr(part))


def _enclosed(function: Any) -> dict[str, Any]:
    """What a function encloses that decides about its results, as {"enclosed": ...}; {} where there is nothing."""
    found = {}
    function = getattr(function, "__func__", function)
    for name, cell in zip(*_cells(function), strict=True):
        with contextlib.suppress(ValueError):  # a cell that is empty
            if _decides(cell.cell_contents) and name not in _rebound(function):
                found[name] = describe(cell.cell_contents)
    return {"enclosed": found} if found else {}


def _decides(value: Any) -> bool:
    """Whether what a function or an object keeps may decide about its results, rather than remember them."""
    kinds = (nn.Module, Tensor, np.ndarray, NamedOptions)
    plain = isinstance(value, _PLAIN) and not isinstance(value, _MUTABLE)
    return plain or isinstance(value, kinds) or module_behind(value) is not None


def _held(part: object) -> dict[str, Any]:
    """What an object keeps that decides about its results: none of what its methods set in their calls."""
    kinds = [kind for kind in type(part).__mro__ if not _has_version(kind)]
    methods = [f for kind in kinds for f in vars(kind).values() if inspect.isfunction(f) and f.__name__ not in _MAKERS]
    remembered = {
        step.argval for method in methods for step in dis.get_instructions(method) if step.opname == "STORE_ATTR"
    }
    kept = getattr(part, "__dict__", {}).items()
    return {name: value for name, value in kept if _decides(value) and name not in remembered}


def _values_checksum(values: Tensor | np.ndarray) -> str:
    """The checksum of numbers; of those that have no bytes of their own, such as sparse tensors, their text."""
    with contextlib.suppress(RuntimeError, NotImplementedError, TypeError):
        if isinstance(values, Tensor):
            return tensor_checksum([("", values.detach().resolve_conj().resolve_neg())])
        if not values.dtype.hasobject:
            return hashlib.sha256(values.dtype.str.encode() + np.ascontiguousarray(values).tobytes()).hexdigest()
    return ADDRESS.sub("", repr(values))


def _cells(function: Any) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Names and cells of what a function encloses."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    return (code.co_freevars, cells) if code is not None and cells else ((), ())


def _rebound(function: Any) -> set[str]:
    """The names that a function encloses and sets itself, such as a counter."""
    return {step.argval for step in dis.get_instructions(function) if step.opname == "STORE_DEREF"}


def own_code(thing: object) -> dict[str, str]:
    """The checksum of the code of a user's function or class, with the classes that it extends, as {"code": ...}.

    {} for what is in a package that has a version, as this one and torch, and for what is not written in Python. What a
    function calls does not show.
    """
    kind: Any = thing if hasattr(thing, "__qualname__") else type(thing)
    parts = inspect.getmro(kind) if inspect.isclass(kind) else (kind,)
    sources = [source for part in parts for source in _sources(part) if not _has_version(part)]
    return {"code": hashlib.sha256("\n".join(sources).encode()).hexdigest()} if sources else {}


def _sources(part: Any) -> list[str]:
    """The source of a function or class. Where Python does not find it, as for code from standard input, what a
    function is compiled to, with its defaults and the constants that it was made with; of a class, its methods and its
    plain values, but for private lists, dictionaries and sets, which are what a class remembers."""
    with contextlib.suppress(OSError, TypeError):
        return [inspect.getsource(part)]
    part = getattr(part, "__func__", part)
    if not inspect.isclass(part):
        return [
            ADDRESS.sub("", repr(_compiled_function(layer))) for layer in _layers(part) if inspect.isfunction(layer)
        ]
    found = []
    for name, value in vars(part).items():
        if inspect.isclass(value) and value.__qualname__ == f"{part.__qualname__}.{name}":
            found += _sources(value)
        elif isinstance(value, _PLAIN) and not name.startswith("_" if isinstance(value, _MUTABLE) else "__"):
            found.append(ADDRESS.sub("", f"{name} = {_constant(value)!r}"))
        else:
            given = [getattr(value, place, None) for place in ("fget", "fset", "fdel", "func", "__func__")]
            found += [
                source for function in (value, *given) if inspect.isfunction(function) for source in _sources(function)
            ]
            if isinstance(value, (functools.partial, functools.partialmethod)):
                found.append(ADDRESS.sub("", repr((_constant(value.args), _constant(value.keywords)))))
    return found


def _layers(function: Any) -> Iterator[Any]:
    """What a function is wrapped in by decorators, and it."""
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


def _compiled_function(function: FunctionType) -> tuple[Any, ...]:
    """What a function is made of, the same in every process of one version of Python."""
    enclosed, code = [], function.__code__
    for name, cell in zip(*_cells(function), strict=True):
        with contextlib.suppress(ValueError):  # a cell that is empty
            kept = isinstance(cell.cell_contents, _PLAIN) and not isinstance(cell.cell_contents, _MUTABLE)
            enclosed += [(name, _constant(cell.cell_contents))] if kept and name not in _rebound(function) else []
    return _compiled(code), _constant(function.__defaults__), _constant(function.__kwdefaults__), enclosed


def _compiled(code: CodeType) -> tuple[Any, ...]:
    place = code.co_firstlineno if "__firstlineno__" in code.co_names else None  # from Python 3.13 on, of a class
    constants = [_constant(value) for value in code.co_consts if place is None or value != place]
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return code.co_code, getattr(code, "co_exceptiontable", b""), names, constants


def _constant(value: Any) -> Any:
    """A value with its sets in an order that is the same in every process."""
    if isinstance(value, CodeType):
        return _compiled(value)
    if isinstance(value, (set, frozenset)):
        return sorted(repr(_constant(part)) for part in value)
    if isinstance(value, dict):
        return [(_constant(name), _constant(part)) for name, part in value.items()]
    return [_constant(part) for part in value] if isinstance(value, (list, tuple)) else value


def _has_version(part: Any) -> bool:
    return str(part.__module__).partition(".")[0] in {"cmap_defense", "torch", "torchvision", "numpy", *_STANDARD}


def describe_module(module: object) -> dict[str, Any]:
    """Class, layers, weights and precision. What is done between the layers, and other attributes, do not show."""
    network, weights = None, []
    if isinstance(module, nn.Module):
        network = hashlib.sha256(ADDRESS.sub("", nn.Module.__repr__(module)).encode()).hexdigest()
        weights = named_weights(module)
    return {
        "class": qualified_name(module),
        "network": network,
        "weights": tensor_checksum(weights),
        "precision": str(dtype_of(module)),
    }


def describe_values(values: Tensor, digits: int = 4) -> list[float]:
    """Numbers, rounded so that they are the same on all processors: what a description of classes and weights does not
    show (functions, constants that are plain attributes) shows in what a model makes of an image. Those that are not
    finite, such as logits of classes that are ruled out, are left out."""
    return [float(f"{value:.{digits}g}") for value in values[values.isfinite()].double().tolist()]


def description_text(description: Any) -> str:
    """A description as it would be written in Python, such as ``PGD(threat=ThreatModel(norm='linf', eps=0.1))``."""
    if isinstance(description, list):
        return f"[{', '.join(map(description_text, description))}]"
    if not isinstance(description, Mapping):
        return repr(description)
    if "function" in description:
        return str(description["function"])
    parts = [
        f"{name}={description_text(value)}" for name, value in description.items() if name not in ("class", "code")
    ]
    return f"{description.get('class', '')}({', '.join(parts)})"


def qualified_name(thing: object) -> str:
    """Module and qualified name, of a function or of an object's class."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"  # pyright: ignore[reportAttributeAccessIssue]


def _options(value: NamedOptions, less: Collection[str] = ()) -> dict[str, Any]:
    """The constructor's options, which are attributes of the object or of a dataclass among these; ``less`` are left
    out."""
    attributes = dict(vars(value))
    for part in vars(value).values():
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            attributes = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)} | attributes
    parameters = list(inspect.signature(type(value).__init__).parameters.values())[1:]
    named = [one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    if own_code(value) and not attributes.keys() >= set(named):  # kept under other names: all that decides
        named = list(_held(value))
    return {name: describe(attributes[name]) for name in named if name in attributes and name not in less}


def named_weights(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers, also those that are not saved with the rest, as a model's own normalisation often is."""
    saved = module.state_dict()
    return [*saved.items(), *((name, buffer) for name, buffer in module.named_buffers() if name not in saved)]
