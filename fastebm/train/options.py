"""Tables of names for the command line, and their options: ``--objective dsm --set objective.sigma=0.3``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ..words import did_you_mean

__all__ = ["Entry", "built", "check_options", "entry_of", "options_of"]


@dataclass(frozen=True)
class Entry:
    """An entry of a table: how a thing is built from a run's configuration and data.

    Options are the keyword-only parameters of ``build``, and those of ``of``, to which it passes the others.

    Args:
        words: what it is, for help texts. given: parameters of ``of`` that the configuration sets in another way.
    """

    words: str
    build: Callable[..., Any]
    of: Callable[..., Any] | None = None
    given: tuple[str, ...] = ()


_Entry = TypeVar("_Entry", bound=Entry)


def entry_of(kind: str, table: Mapping[str, _Entry], name: str) -> _Entry:
    """The entry of a name. kind: "objective", "model" or "sampler".

    Raises:
        ValueError: there is none.
    """
    if name not in table:
        raise ValueError(f"there is no {kind} {name!r}{did_you_mean(name, table)} (there are {', '.join(table)})")
    return table[name]


def options_of(entry: Entry) -> dict[str, inspect.Parameter]:
    """The options of an entry by name."""
    own = inspect.signature(entry.build).parameters.values()
    found = {p.name: p for p in own if p.kind is p.KEYWORD_ONLY}
    passed = () if entry.of is None else inspect.signature(entry.of).parameters.values()
    return {p.name: p for p in passed if p.name not in entry.given and p.kind is not p.VAR_KEYWORD} | found


def check_options(kind: str, name: str, entry: Entry, options: Mapping[str, Any]) -> None:
    """Refuse options that an entry does not have, and the lack of one that it needs.

    Raises:
        ValueError: it names the option.
    """
    known = options_of(entry)
    for option in options:
        if option not in known:
            there = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"the {kind} {name} has no option {option!r}{did_you_mean(option, known)} ({there})")
    for option, p in known.items():
        if p.default is p.empty and option not in options:
            raise ValueError(f"the {kind} {name} needs --set {kind}.{option}=VALUE")


def built(kind: str, name: str, entry: Entry, *arguments: Any, options: Mapping[str, Any]) -> Any:
    """What an entry builds. An error about an option's value names the table's name too."""
    try:
        return entry.build(*arguments, **options)
    except TypeError as error:
        raise ValueError(f"the {kind} {name}: {error}") from error
