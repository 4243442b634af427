"""Checks of a pool's saved state, for ``ChainPool.load_state_dict``. They change nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..box import Bounds
from .starts import LAWS

__all__ = ["VERSION", "checked", "plain_clamp", "saved_clamp"]

# Version of the format. Version 2 had "restarts" for "reinits", and at first no "condition".
VERSION = 3
_READ = (2, 3)

# Numbers whose finiteness is tested at once, so that a large pool needs little memory beside itself.
_NUMBERS_AT_ONCE = 2**20


def checked(state: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a pool in today's format, if it fits the pool whose own state is ``mine``.

    Raises:
        TypeError, ValueError: as ``ChainPool.load_state_dict``.
    """
    state = _upgraded(state)
    if missing := sorted(mine.keys() - state.keys()):
        raise ValueError(f"not the state of a ChainPool: missing {', '.join(missing)}")
    expected = {name: value for name, value in mine.items() if isinstance(value, Tensor)}
    n_local = len(mine["x"])
    # Whether there are labels or a condition, and of what shape, is part of what is loaded.
    expected.pop("labels", None)
    expected.pop("condition", None)
    if state["labels"] is not None:
        expected["labels"] = mine["steps"]
    if (condition := state["condition"]) is not None:
        rows = condition.shape[:1] if isinstance(condition, Tensor) else ()
        if rows != (n_local,) or state["labels"] is not None:
            raise ValueError(f"condition must be a tensor of shape ({n_local}, ...), and labels must then be None")
        expected["condition"] = condition
    for name in expected:
        if not isinstance(state[name], Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(state[name]).__name__}")
    _check_fit(state, mine)
    for name, tensor in expected.items():
        value = state[name]
        if value.shape != tensor.shape or value.dtype != tensor.dtype:
            raise ValueError(
                f"{name} must be {tuple(tensor.shape)} of {tensor.dtype}, got {tuple(value.shape)} of {value.dtype}"
            )
    _check_values(state)
    return state


def saved_clamp(clamp: Any) -> Any:
    """The clamp of a saved state as ``Box.of`` takes it: bounds that were tensors were saved as lists."""
    if isinstance(clamp, list):
        return tuple(torch.tensor(v) if isinstance(v, list) else v for v in clamp)
    return clamp


def plain_clamp(clamp: Bounds | None) -> list[Any] | None:
    """The inverse of ``saved_clamp``: numbers and lists only."""
    return None if clamp is None else [v.tolist() if isinstance(v, Tensor) else v for v in clamp]


def _upgraded(state: Mapping[str, Any]) -> dict[str, Any]:
    version = state.get("version", VERSION)
    if version not in _READ:
        raise ValueError(
            f"the pool was saved in version {version!r} of the format, and this release reads versions "
            f"{', '.join(map(str, _READ))}: use the release that saved it, or start a new pool"
        )
    state = dict(state)
    if version == 2:
        state.setdefault("condition", None)
        if "restarts" in state:
            state["reinits"] = state.pop("restarts")
    return state


def _check_fit(state: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Sizes, storage and starts are those of this pool."""
    n_local, shape = len(mine["x"]), tuple(mine["shape"])
    theirs = (state["n_chains"], len(state["x"]), tuple(state["shape"]))
    if theirs != (mine["n_chains"], n_local, shape) or state["x"].shape != mine["x"].shape:
        raise ValueError(
            f"the saved pool has {theirs[0]} chains of shape {theirs[2]}, {theirs[1]} of them in this process; this "
            f"pool has {mine['n_chains']} of shape {shape}, {n_local} of them in this process"
        )
    if state["storage_dtype"] != mine["storage_dtype"]:
        raise ValueError(
            f"the saved pool has storage_dtype {state['storage_dtype']}, this one {mine['storage_dtype']}: build it "
            "with the same storage_dtype"
        )
    if state["init"] not in (mine["init"], *LAWS):
        raise ValueError(
            f"chains of the saved pool start from {state['init']}, chains of this one from {mine['init']}: build it "
            "with the same init="
        )


def _check_values(state: Mapping[str, Any]) -> None:
    """Values that no pool can have."""
    damaged = "the saved pool is damaged"
    x = state["x"]
    parts = torch.split(x, max(1, _NUMBERS_AT_ONCE // x.shape[1]))
    if x.is_floating_point() and not all(bool(part.isfinite().all()) for part in parts):
        raise ValueError(f"{damaged}: states that are not finite")
    counts = [state[name] for name in ("steps", "started", "reinits", "nonfinite")]
    if any(bool((v < 0).any()) for v in counts) or bool((state["started"] > state["steps"]).any()):
        raise ValueError(f"{damaged}: negative steps or counts, or chains that started after their last step")
    for name in ("draws", "added"):
        value = state[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{damaged}: {name} must be an int >= 0, got {value!r}")
    reinit_prob = state["reinit_prob"]
    if not isinstance(reinit_prob, float) or not 0.0 <= reinit_prob <= 1.0:
        raise ValueError(f"{damaged}: reinit_prob must be in [0, 1], got {reinit_prob!r}")
    if state["seed"] is None:
        raise ValueError(f"{damaged}: it has no seed")
