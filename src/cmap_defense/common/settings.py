"""Frozen settings: validated when made, exact JSON round trip.

A subclass of ``Settings`` is a frozen dataclass. Fields made by ``setting`` are checked against their types and bounds;
what relates several fields to each other stands in a ``__post_init__``, which may call the ``require_*`` helpers.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import numbers
import operator
import os
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import Self

from cmap_defense.common.options import NamedOptions, near_matches, other_name
from cmap_defense.errors import SettingsError

BOUNDS = ("minimum", "above", "maximum", "below", "choices", "pattern", "like")
"""Keys of a field's metadata that its value is checked against."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(NamedOptions):
    """Base of all settings. Make a changed copy with ``replace``."""

    def __post_init__(self) -> None:
        """Check the fields that ``setting`` made."""
        check_fields(self)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values (tuples become lists, nested settings become dicts)."""
        return json.loads(self.to_json())

    def to_json(self, *, indent: int | None = None) -> str:
        """The fields as a JSON object, but for those with ``compare=False``. ``from_json`` gives an equal object."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.compare}
        return json.dumps(values, indent=indent, allow_nan=False, default=_plain)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Settings from a mapping. Raises ``SettingsError`` on unknown, missing or invalid fields."""
        if not isinstance(values, Mapping):
            raise SettingsError(
                f"{cls.__name__} is made from a mapping of its fields, but got {type(values).__name__}."
            )
        known = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                meant = other_name(cls, str(name)) or near_matches(str(name), known)
                raise SettingsError(f"{cls.__name__} has no setting {name!r}.{meant}")
        try:
            return cls(**values)
        except TypeError as error:
            raise SettingsError(f"{cls.__name__}: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Settings from the text of ``to_json``. Raises ``SettingsError`` when the text is not that."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise SettingsError(f"{cls.__name__}: this is not JSON: {error}") from error
        return cls.from_dict(values)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated again. Raises ``SettingsError``."""
        return self.from_dict({field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | changes)


def check_fields(made: Any) -> None:
    """Check the fields of a frozen dataclass that ``setting`` made; lists become tuples."""
    for field in dataclasses.fields(made):
        value, (kinds, bounds) = getattr(made, field.name), _declared(type(made), field.name)
        if kinds and not (value is None and type(None) in kinds):
            object.__setattr__(made, field.name, _checked(type(made).__name__, field.name, value, kinds, **bounds))


@functools.cache
def _declared(owner: type, name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Types and bounds of a field, by the nearest class that made it by ``setting``: a subclass may change its default.

    Nothing for other fields, whose hints need not be known.
    """
    for base in owner.__mro__:
        field = getattr(base, "__dataclass_fields__", {}).get(name)
        if field is not None and "help" in field.metadata and name in inspect.get_annotations(base):
            hint = inspect.get_annotations(base)[name]
            hint = eval(hint, vars(sys.modules[base.__module__])) if isinstance(hint, str) else hint
            kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            return kinds, {key: bound for key, bound in field.metadata.items() if key in BOUNDS}
    return (), {}


def setting(default: Any = dataclasses.MISSING, phrase: str = "", **metadata: Any) -> Any:
    """A field of ``Settings`` whose value is checked by its type and bounds, and which may be an option.

    Args:
        default: of the field; none makes it required.
        phrase: the meaning of the option as a whole phrase, ``metadata["help"]``; empty for a field without an option.
        metadata: bounds, of a sequence those of its items: ``minimum`` of an integer; ``minimum``, ``above``,
            ``maximum`` or ``below`` of a number; ``choices`` of a text, or ``pattern``: a regular expression and what
            it stands for; ``like``, in words what an object of the field's class is. For the help of a command:
            ``group``, the heading of the option; ``default_help``, the text for the default None.
    """
    made: dict[str, Any] = {"default_factory": default.copy} if isinstance(default, dict) else {"default": default}
    return dataclasses.field(metadata={"help": phrase, **metadata}, **made)


def _checked(owner: str, name: str, value: Any, kinds: Sequence[Any], **bounds: Any) -> Any:
    """A value of one of these types within the bounds; a sequence as a tuple, whose items they are of."""
    origin = typing.get_origin(kinds[0])
    if origin is tuple:
        items, *more = typing.get_args(kinds[0])
        length = None if more == [Ellipsis] else 1 + len(more)
        values = _sequence(owner, name, value, length)
        return tuple(_checked(owner, f"{name}[{i}]", item, [items], **bounds) for i, item in enumerate(values))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise SettingsError(f"{owner}.{name} must be an object, but is {value!r}.")
        return dict(value)  # its own: a change to the caller's, or to another record's, is none to this one
    if "choices" in bounds:
        require_choice(owner, name, value, bounds["choices"])
    elif bool in kinds:
        require_flag(owner, name, value)
    elif int in kinds:
        return require_integer(owner, name, value, **bounds)
    elif float in kinds:
        number = require_number(owner, name, value, **bounds)
        return value if isinstance(value, (int, float)) else number
    elif str in kinds:
        pattern, what = bounds.get("pattern", ("(?s:.*)", "text"))
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise SettingsError(f"{owner}.{name} must be {what}, but is {value!r}.")
    elif "like" in bounds and not isinstance(value, tuple(kinds)):
        raise SettingsError(f"{owner}.{name} must be {bounds['like']}, but is {value!r}.")
    return value


def _plain(value: Any) -> Any:
    """Nested settings as a mapping; a number of numpy's as Python's own; a path as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, numbers.Real):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{value!r} has no place in JSON")


def _sequence(owner: str, name: str, values: Any, length: int | None) -> Sequence[Any]:
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != (length or len(values)):
        what = "a sequence" if length is None else "1 number in a sequence" if length == 1 else f"{length} numbers"
        raise SettingsError(f"{owner}.{name} must be {what}, but is {values!r}.")
    return values


def require_integer(owner: str, name: str, value: Any, **bounds: int | None) -> int:
    """``value`` as an int within the bounds of ``require_number``, or a ``SettingsError`` that names the setting."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise SettingsError(f"{owner}.{name} must be an integer, but is {value!r} ({type(value).__name__}).")
    return _within(owner, name, int(value), bounds, "d")


def require_number(owner: str, name: str, value: Any, **bounds: float | None) -> float:
    """``value`` as a finite float, or a ``SettingsError`` that names the setting.

    ``bounds`` are ``minimum``, ``above``, ``maximum`` and ``below``.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise SettingsError(f"{owner}.{name} must be a number, but is {value!r} ({type(value).__name__}).")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise SettingsError(f"{owner}.{name} must be finite, but is {number}.")
    return _within(owner, name, number, bounds, "g")


def _within(owner: str, name: str, number: Any, bounds: Mapping[str, Any], form: str) -> Any:
    for kind, bound in bounds.items():
        words, holds = _COMPARED[kind]
        if bound is not None and not holds(number, bound):
            raise SettingsError(f"{owner}.{name} must be {words} {bound:{form}}, but is {number:{form}}.")
    return number


_COMPARED = {
    "minimum": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "maximum": ("at most", operator.le),
    "below": ("below", operator.lt),
}


def require_numbers(owner: str, name: str, values: Any, *, length: int, **bounds: float) -> tuple[float, ...]:
    """``values`` as a tuple of ``length`` finite floats, each within the bounds of ``require_number``."""
    listed = _sequence(owner, name, values, length)
    return tuple(require_number(owner, f"{name}[{i}]", value, **bounds) for i, value in enumerate(listed))


def require_flag(owner: str, name: str, value: Any) -> bool:
    """``value`` when it is True or False, or a ``SettingsError``."""
    if not isinstance(value, bool):
        raise SettingsError(f"{owner}.{name} must be True or False, but is {value!r}.")
    return value


def require_choice(owner: str, name: str, value: Any, choices: Sequence[str]) -> str:
    """``value`` when it is one of ``choices``, or a ``SettingsError`` that lists them."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise SettingsError(f"{owner}.{name} must be one of {listed}, but is {value!r}.")
    return value


def in_255ths(value: float) -> str:
    """A number such as "8/255"; empty where it is no whole number of 255ths between 0 and 1."""
    steps = round(255 * value)
    return f"{steps}/255" if 0 < steps < 255 and abs(255 * value - steps) < 1e-9 else ""
