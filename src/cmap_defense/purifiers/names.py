"""Purifiers by name, and from the texts of a command line."""

from __future__ import annotations

import ast
import dataclasses
import fractions
import itertools
import string
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from cmap_defense.cmap.settings import CMAPSettings
from cmap_defense.common.settings import near_matches
from cmap_defense.errors import SettingsError, UnknownNameError
from cmap_defense.purifiers.adp import ADP
from cmap_defense.purifiers.base import Purifier
from cmap_defense.purifiers.chain import Chain
from cmap_defense.purifiers.cmap import CMAP
from cmap_defense.purifiers.diffpure import DiffPure
from cmap_defense.purifiers.gdmp import GDMP
from cmap_defense.purifiers.gnsp import GNSP
from cmap_defense.purifiers.identity import Identity
from cmap_defense.purifiers.likelihood_maximisation import LikelihoodMaximisation
from cmap_defense.purifiers.one_step import OneStep

__all__ = ["NAMES", "by_name", "from_texts", "name_of", "parts_of", "purifier_from_dict", "words_of"]

NAMES: Mapping[str, type[Purifier]] = MappingProxyType(
    {
        "cmap": CMAP,
        "one-step": OneStep,
        "diffpure": DiffPure,
        "gdmp": GDMP,
        "adp": ADP,
        "gnsp": GNSP,
        "likelihood-maximisation": LikelihoodMaximisation,
        "chain": Chain,
        "identity": Identity,
    }
)
"""The purifiers of the package by name."""


OPENING, CLOSING = "([", ")]"
"""Brackets in the texts of a command line, all of one kind."""


def by_name(name: Any) -> type[Purifier]:
    """The class of a name of ``NAMES``, such as "diffpure".

    Args:
        name: in lower case.

    Raises:
        UnknownNameError: there is none; the message lists near matches.
    """
    if not isinstance(name, str) or name not in NAMES:
        raise UnknownNameError(f"There is no purifier {name!r}.{near_matches(str(name), NAMES)}")
    return NAMES[name]


def purifier_from_dict(values: Mapping[str, Any]) -> Purifier:
    """The purifier of ``{"purifier": name, **settings}``, as in JSON.

    Raises:
        UnknownNameError: there is no purifier of that name.
        SettingsError: the settings do not fit.
    """
    settings = dict(values)
    return by_name(settings.pop("purifier", None)).from_dict(settings)


def name_of(purifier: Purifier) -> str:
    """The name of a purifier's class. Raises ``UnknownNameError`` where it is none of the package's."""
    for name, kind in NAMES.items():
        if type(purifier) is kind:
            return name
    raise UnknownNameError(
        f"{type(purifier).__name__} is not one of the purifiers that have a name: {', '.join(NAMES)}."
    )


def from_texts(name: str, settings: Iterable[str] = (), start: Purifier | None = None) -> Purifier:
    """A purifier from its name and settings as a command line has them: ``from_texts("diffpure", ["t=75"])``.

    Args:
        name: of ``NAMES``.
        settings: texts "key=value". Values are numbers (also fractions such as 8/255), true, false, none, numbers with
            commas between them, or words. "preset=name" begins from ``Purifier.preset``. Of "chain" the purifiers
            are texts for ``words_of`` with commas between them: "purifiers=diffpure t=60, cmap level=0.5".
        start: one of this name, whose settings change; None to start from the defaults.

    Raises:
        UnknownNameError: there is no such purifier or preset.
        SettingsError: a text is not of this form, or a value does not fit.
    """
    kind, values = by_name(name), {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            remedy = " A value with spaces needs brackets: purifiers=(diffpure t=60, cmap)." if kind is Chain else ""
            raise SettingsError(f"A setting of a purifier is written key=value, such as t=75, but is {text!r}.{remedy}")
        if key.strip() in values:
            raise SettingsError(f"{key.strip()} is given twice; leave one of them out.")
        values[key.strip()] = value.strip()
    start = kind.preset(values.pop("preset")) if "preset" in values else start
    kept = {} if start is None else _fields(start)
    return kind.from_dict(kept | {key: _value(kind, key, text) for key, text in values.items()})


def words_of(text: str) -> list[str]:
    """The name and the settings of a purifier that is one text, such as "diffpure t=60 step=0.01".

    Args:
        text: name and settings with spaces between them. Brackets hold a value with spaces together, as in
            "chain purifiers=(diffpure t=60, cmap level=0.5) handed_on=mean".

    Raises:
        SettingsError: a bracket is not closed, or not opened.
    """
    return [word for word in _split(text, string.whitespace) if word]


def parts_of(text: str) -> list[str]:
    """The texts of a chain's purifiers, each for ``words_of``.

    Args:
        text: such as "diffpure t=60, cmap level=0.5", with brackets around all of it or around each, or without. In a
            purifier's settings, values with commas have brackets: "gnsp rounds=(30,50), cmap".

    Raises:
        SettingsError: a bracket is not closed, or not opened.
    """
    return [_unwrapped(part.strip()) for part in _split(_unwrapped(text.strip()), ",")]


def _unwrapped(text: str) -> str:
    """The text without brackets around all of it."""
    if not text or text[0] not in OPENING or text[-1] not in CLOSING:
        return text
    depths = list(itertools.accumulate((c in OPENING) - (c in CLOSING) for c in text))
    return text[1:-1].strip() if min(depths[:-1]) > 0 and not depths[-1] else text


def _split(text: str, separators: str) -> list[str]:
    """What is between separators that are outside of brackets."""
    depth, parts = 0, [""]
    for character in text:
        depth += (character in OPENING) - (character in CLOSING)
        if depth < 0:
            break
        if not depth and character in separators:
            parts.append("")
        else:
            parts[-1] += character
    if depth:
        missing = "closed" if depth > 0 else "opened"
        raise SettingsError(
            f"A bracket in {text!r} is not {missing}: write for instance purifiers=(diffpure t=60, cmap)."
        )
    return parts


def _fields(purifier: Purifier) -> dict[str, Any]:
    settings = purifier.settings if isinstance(purifier, CMAP) else purifier
    return {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}  # pyright: ignore[reportArgumentType]


def _value(kind: type[Purifier], key: str, text: str) -> Any:
    """The value of a text: a tuple where the setting is one, also of one number or none."""
    owner: Any = CMAPSettings if issubclass(kind, CMAP) else kind
    default = {field.name: field.default for field in dataclasses.fields(owner)}.get(key)
    if isinstance(default, tuple):
        return tuple(_plain(part.strip()) for part in text.strip("()[]").split(",") if part.strip())
    return _plain(text)


def _plain(text: str) -> Any:
    lower = text.lower()
    if lower in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[lower]
    try:
        return float(fractions.Fraction(text)) if "/" in text else ast.literal_eval(text)
    except (ValueError, SyntaxError, ZeroDivisionError):
        return text
