"""Parts of error messages: a suggestion for a misspelt name, and lists of names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = ["did_you_mean", "listed"]


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """ ": did you mean NAME?" if a name is similar to the word, else the empty string."""
    near = difflib.get_close_matches(word.lower(), by_lower := {name.lower(): name for name in names}, 1)
    return f": did you mean {by_lower[near[0]]}?" if near else ""


def listed(names: Sequence[str], most: int = 5) -> str:
    """The names in quotes, at most ``most`` of them: "'a', 'b', ... (7 in all)"."""
    return ", ".join(map(repr, names[:most])) + (f", ... ({len(names)} in all)" if len(names) > most else "")
