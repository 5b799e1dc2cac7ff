"""Unknown keyword arguments of constructors: errors that say which object has the option, or which name is near."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from typing_extensions import Self

from cmap_defense.errors import OptionError


class NamedOptions:
    """Base of classes that are made from options by name.

    An unknown option raises ``OptionError``. It is looked for among the options of the class
    and of the objects that the class takes, which are read from its type hints. Signatures stay those of ``__init__``.

    A subclass may set ``_synonyms``, other names of its options, ``_advice``, sentences about names that are no option
    of any object, and ``_example``, whether it is the one to name where several classes have an option.
    """

    _example: ClassVar[bool] = False
    _synonyms: ClassVar[Mapping[str, str]] = {}
    _advice: ClassVar[Mapping[str, str]] = {}

    def __new__(cls, *args: Any, **options: Any) -> Self:
        known = list(inspect.signature(cls.__init__).parameters.values())[1:] if args or options else []
        if args and all(parameter.kind is parameter.KEYWORD_ONLY for parameter in known):
            shown = ", ".join(f"{parameter.name}={value!r}" for parameter, value in zip(known, args, strict=False))
            raise OptionError(f"{cls.__name__} takes its options by name, such as {cls.__name__}({shown or ''}).")
        if options:
            names = {parameter.name for parameter in known}
            several = {parameter.name for parameter in known if parameter.kind is parameter.VAR_POSITIONAL}
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
                for name, value in options.items():
                    if name not in names - several:
                        raise OptionError(unknown_option(cls, name, value))
        return super().__new__(cls)


@dataclasses.dataclass(frozen=True)
class _Option:
    """An option of the class ``home``, and the constructor's ``call`` that sets it ({} for the option and value)."""

    name: str
    home: type[NamedOptions]
    call: str

    def text(self, value: str) -> str:
        return self.call.format(f"{self.name}={value}")


def unknown_option(owner: type[NamedOptions], name: str, value: object) -> str:
    """What to say about an option that a class does not have: where it belongs, or which one is near."""
    refusal = f"{owner.__name__} has no option {name!r}."
    shown = repr(value)
    shown = shown if len(shown) <= 40 and "\n" not in shown else "..."
    advice = _of(owner, "_advice").get(name.lower())
    if advice is not None:
        return f"{refusal} {advice}"
    within = list(_options(owner))
    synonyms = [called for home in _homes(within) if (called := _synonym(home, name))]
    wanted_names = [*synonyms, name] if _synonym(owner, name) else [name, *synonyms]
    for wanted in wanted_names:
        found = [option for option in within if option.name == wanted]
        own = [option for option in found if option.home is owner]
        if own:
            return f"{refusal} It is called {wanted!r}: {own[0].text(shown)}."
        if found:
            called = "It" if wanted == name else repr(wanted)
            places = " and ".join(f"of {option.home.__name__}: {option.text(shown)}" for option in _one_per_home(found))
            return f"{refusal} {called} is an option {places}."
    own = {n for n, parameter in _parameters(owner).items() if parameter.kind is not parameter.VAR_POSITIONAL}
    near = _near(name, own, cutoff=0.8)
    if near:
        return refusal + f" Did you mean {next(o for o in within if o.name == near[0]).text(shown)}?"
    elsewhere = sorted({kind.__name__ for kind in _concrete(NamedOptions) if name in _parameters(kind)})
    if elsewhere:
        return f"{refusal} It is an option of {', '.join(elsewhere[:3])}{' and others' if len(elsewhere) > 3 else ''}."
    near = _near(name, {option.name for option in within})
    if near:
        return f"{refusal} Did you mean {next(option for option in within if option.name == near[0]).text(shown)}?"
    return refusal + near_matches(name, _parameters(owner))


def other_name(owner: type[NamedOptions], name: str) -> str:
    """A sentence about a name for which a class has another one, or advice; starts with a space, "" for any other."""
    advice = _of(owner, "_advice").get(name.lower())
    if advice is not None:
        return f" {advice}"
    called = _synonym(owner, name)
    return f" It is called {called!r}." if called in _parameters(owner) else ""


def near_matches(name: str, known: Sequence[str] | set[str] | Mapping[str, Any]) -> str:
    """A sentence with the names nearest to ``name``, or all of them when none is near; starts with a space."""
    near = _near(name, known)
    if near:
        return " Did you mean " + " or ".join(repr(n) for n in near) + "?"
    return " Known: " + ", ".join(repr(n) for n in sorted(known)) + "."


def _near(name: str, known: Sequence[str] | set[str] | Mapping[str, Any], cutoff: float = 0.5) -> list[str]:
    by_lower = {known_name.lower(): known_name for known_name in sorted(known)}
    return [by_lower[n] for n in difflib.get_close_matches(name.lower(), list(by_lower), n=3, cutoff=cutoff)]


def _options(owner: type[NamedOptions], call: str = "{}", depth: int = 0) -> Iterator[_Option]:
    """The options of a class, then those of the objects that it takes, two levels deep."""
    parameters = _parameters(owner)
    several = {name for name, parameter in parameters.items() if parameter.kind is parameter.VAR_POSITIONAL}
    required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty} - several
    for name in parameters:
        others = "..., " if required - {name} else ""
        yield _Option(name, owner, call.format(f"{owner.__name__}({others}{{}})"))
    for name, parameter in parameters.items() if depth < 2 else ():
        for taken in _taken(owner, name):
            first = parameter.kind is parameter.POSITIONAL_OR_KEYWORD or name in several
            inner = f"{owner.__name__}({{}}, ...)" if first else f"{owner.__name__}(..., {name}={{}})"
            yield from _options(taken, call.format(inner), depth + 1)


def _parameters(kind: type[NamedOptions]) -> dict[str, inspect.Parameter]:
    return dict(list(inspect.signature(kind.__init__).parameters.items())[1:])


def _taken(owner: type[NamedOptions], name: str) -> list[type[NamedOptions]]:
    """The classes with options that an option of a class may be an object of; for an abstract one, its subclasses."""
    try:
        hint = (
            _hint(owner, name) if dataclasses.is_dataclass(owner) else typing.get_type_hints(owner.__init__).get(name)
        )
    except NameError:  # a hint of the user's that is there for type checkers alone
        return []
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if isinstance(kind, type)]
    found = [below for kind in kinds if issubclass(kind, NamedOptions) for below in _concrete(kind)]
    return sorted(found, key=lambda kind: (not kind._example, len(kind.__name__)))  # PGD before FrozenResidual


def _hint(owner: type, name: str) -> Any:
    """The type of a field, by the nearest class that names it. Python 3.10 has no hint of ``KW_ONLY``."""
    for base in owner.__mro__:
        found = inspect.get_annotations(base).get(name)
        if found is not None:
            return eval(found, vars(sys.modules[base.__module__])) if isinstance(found, str) else found
    return None


def _concrete(kind: type[NamedOptions]) -> list[type[NamedOptions]]:
    """A class and its subclasses in this package, less those that are abstract or private."""
    own = [] if inspect.isabstract(kind) or kind is NamedOptions or kind.__name__.startswith("_") else [kind]
    ours = [below for below in kind.__subclasses__() if below.__module__.startswith("cmap_defense.")]
    return own + [found for below in ours for found in _concrete(below)]


def _of(kind: type[NamedOptions], attribute: str) -> dict[str, str]:
    """``_synonyms`` or ``_advice`` of a class and of those that it extends, by names in lower case."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        found |= {name.lower(): words for name, words in vars(base).get(attribute, {}).items()}
    return found


def _synonym(kind: type[NamedOptions], name: str) -> str | None:
    """What an option is called in a class; K and k are one name."""
    return _of(kind, "_synonyms").get(name.lower())


def _homes(options: Sequence[_Option]) -> list[type[NamedOptions]]:
    return list(dict.fromkeys(option.home for option in options))


def _one_per_home(options: Sequence[_Option]) -> list[_Option]:
    """The first two, of different classes, each with its shortest call."""
    return [min((o for o in options if o.home is home), key=lambda o: len(o.call)) for home in _homes(options)[:2]]
