"""What differs between the settings of earlier results and those given now: one line per option."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cmap_defense.errors import CmapError

__all__ = ["differences", "refuse_other_settings"]

AROUND = 30
"""Characters that are shown beside a difference of long texts."""

LISTED = 12
"""Lines of a refusal, at most."""

CONTAINERS = {"models", "defended", "tasks", "settings", "threat", "attack", "protocol", "computation", "train"}
"""Groups of settings that say nothing about an option inside them."""

ANSWER = "answer"
"""The name of a model's logits on the first image, which are compared as numbers."""

MISSING = object()

Place = tuple[str, ...]


def refuse_other_settings(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    error: type[CmapError],
    *,
    what: str,
    remedy: str,
    derived: Sequence[str] = (),
) -> None:
    """Refuse to go on with results that were made with other settings.

    Args:
        before: settings of the results that are there, from JSON.
        now: settings given now, anything that JSON can hold.
        error: what is raised.
        what: what is there, the beginning of the message.
        remedy: what to do, its end.
        derived: as for :func:`differences`.

    Raises:
        CmapError: of that kind, unless both are the same.
    """
    lines = differences(before, json.loads(json.dumps(now, allow_nan=False)), derived=derived)
    if lines:
        more = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
        raise error("\n  ".join([f"{what}:", *lines[:LISTED], *more]) + f"\n{remedy}")


def differences(before: Any, now: Any, *, derived: Sequence[str] = ()) -> list[str]:
    """What differs between two JSON values: a line per option, such as "eps: 8/255 before, 4/255 now".

    An option that changed alike in several places, such as the size of all attacks, has one line.

    Args:
        before: the earlier value.
        now: the value given now.
        derived: names of entries that follow from others, or how they begin up to a "/"; they are left out where others
            differ.
    """
    found = [(place, *_shown(old, new)) for place, old, new in _changes(before, now, ())]
    groups = tuple(name for name in derived if name.endswith("/"))
    kept = [change for change in found if not any(part in derived or part.startswith(groups) for part in change[0])]
    changes = kept or found
    names = {place: _name(place) for place, _, _ in changes}
    values: dict[str, set[tuple[str, str]]] = {}
    for place, old, new in changes:
        values.setdefault(names[place], set()).add((old, new))
    lines = {
        f"{names[place] if len(values[names[place]]) == 1 else '.'.join(place)}: {old} before, {new} now": None
        for place, old, new in changes
    }
    return list(lines)


def _changes(before: Any, now: Any, place: Place) -> Iterator[tuple[Place, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys(), key=str):
            yield from _changes(before.get(name, MISSING), now.get(name, MISSING), (*place, str(name)))
    elif before is MISSING or now is MISSING or not (before == now or _alike_logits(before, now, place)):
        yield place, before, now


def _alike_logits(before: Any, now: Any, place: Place) -> bool:
    """Whether both are logits, up to what rounding on another machine of the kind may change."""
    if place[-1:] != (ANSWER,) or not isinstance(before, list) or not isinstance(now, list):
        return False
    largest = max((abs(value) for value in before), default=0.0)
    return len(before) == len(now) and all(
        math.isclose(one, other, abs_tol=1e-2 * largest) for one, other in zip(before, now, strict=True)
    )


def _name(place: Place) -> str:
    """An option by its last part, and by the one before where that is no mere container."""
    if place[-1:] == (ANSWER,) and len(place) > 1:
        return f"logits of {place[-2]} on the first image"
    shown = [part for part in place[:-1] if part not in CONTAINERS and "/" not in part]
    return ".".join([*shown[-1:], *place[-1:]])


def _shown(before: Any, now: Any) -> tuple[str, str]:
    """Two values as texts that differ."""
    old, new = _text(before), _text(now)
    if old == new:
        old, new = repr(before), repr(now)
    return _apart(old, new)


def _text(value: Any) -> str:
    if value is MISSING:
        return "not given"
    if isinstance(value, dict):
        return str(value.get("name") or value.get("class") or "given")
    if isinstance(value, float) and len(repr(value)) > 6:
        steps = round(value * 255)
        return f"{steps}/255" if 0 < steps < 255 and abs(value * 255 - steps) < 1e-9 else repr(value)
    if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value):
        return f"{value[:12]}..."
    return value if isinstance(value, str) and value.strip() == value != "" else repr(value)


def _apart(before: str, now: str) -> tuple[str, str]:
    """Two long texts, cut down to where they differ and a few words around it."""
    if max(len(before), len(now)) <= 4 * AROUND:
        return before, now
    same = _common(before, now)
    rest = _common(before[same:][::-1], now[same:][::-1])
    begin = max(0, same - AROUND)
    ends = [len(text) - max(0, rest - AROUND) for text in (before, now)]
    shown = [
        ("..." if begin else "") + text[begin:end] + ("..." if end < len(text) else "")
        for text, end in zip((before, now), ends, strict=True)
    ]
    return shown[0], shown[1]


def _common(first: str, second: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))
