"""``fastebm train --set KEY=VALUE``: any value of the recipe."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from ..train.models import MODELS
from ..train.objectives import OBJECTIVES
from ..train.options import Entry, options_of
from ..train.recipe import TrainConfig
from ..train.samplers import SAMPLERS
from ..words import did_you_mean

__all__ = ["described", "parsed"]

_DEFAULTS = TrainConfig()

# Entries of the configuration that come from the data.
_OF_DATA = ("data", "clamp", "n_classes")

# What has options of its own, such as objective.sigma.
_TABLES: dict[str, Mapping[str, Entry]] = {"objective": OBJECTIVES, "model": MODELS, "sampler": SAMPLERS}


def _fields() -> dict[str, Any]:
    """Name -> type of each setting."""
    hints = typing.get_type_hints(TrainConfig)
    names = (field.name for field in dataclasses.fields(TrainConfig))
    return {name: hints[name] for name in names if name not in _OF_DATA and not name.endswith("_options")}


def described() -> str:
    """The settings and their defaults, for the help text."""
    settings = (f"{name}={_as_text(getattr(_DEFAULTS, name))}" for name in sorted(_fields()))
    options = (
        f"{kind} {name}: {' '.join(options)}"
        for kind, table in _TABLES.items()
        for name, entry in table.items()
        if (options := [f"{kind}.{option}" for option in options_of(entry)])
    )
    return (
        "Keys of --set, with their values for digits (fastebm/train/recipe.py explains them): "
        f"{' '.join(settings)}. Options: {'; '.join(options)}."
    )


def _as_text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else str(value)


def parsed(words: Sequence[str]) -> dict[str, Any]:
    """The values in a list of KEY=VALUE."""
    fields, values = _fields(), dict[str, Any]()
    for word in words:
        key, equals, text = word.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise ValueError(f"--set takes KEY=VALUE, as in --set learning_rate=0.001, got {word!r}")
        kind, dot, option = key.partition(".")
        if dot and kind in _TABLES:
            options = values.setdefault(f"{kind}_options", {})
            if option in options:
                raise ValueError(f"--set was given {key} twice: {_as_text(options[option])} and {text}")
            options[option] = _literal(text.strip())
            continue
        if key not in fields:
            of_data = f": {key} comes from the data" if key in _OF_DATA else did_you_mean(key, fields)
            raise ValueError(f"--set has no key {key!r}{of_data} (fastebm train --help lists them)")
        if key in values:
            raise ValueError(f"--set was given {key} twice: {_as_text(values[key])} and {text}")
        values[key] = _value(key, text.strip(), fields[key])
    return values


def _literal(text: str) -> Any:
    """Text as the value of an option: none, true, false, a number, numbers separated by commas, or a word."""
    if "," in text:
        return tuple(_literal(part) for part in text.split(",") if part)
    if text.lower() in (words := {"none": None, "true": True, "false": False}):
        return words[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _value(key: str, text: str, kind: Any) -> Any:
    """Text as a value of a type that TrainConfig has: int, float, str, a tuple of numbers, or None."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if types.NoneType in kinds and text.lower() == "none":
        return None
    kind = next(kind for kind in kinds if kind is not types.NoneType)
    try:
        if typing.get_origin(kind) is tuple:
            of = typing.get_args(kind)[0]
            return tuple(of(part) for part in text.split(","))
        return kind(text)
    except ValueError:
        words = {int: "a whole number", float: "a number"}.get(kind, "numbers, separated by commas")
        none = " or none" if types.NoneType in kinds else ""
        raise ValueError(f"--set {key}= takes {words}{none}, got {text!r}") from None
