"""Every hyper-parameter of a training run, and good values of them for each data set."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..data.dataset import Data
from ..data.info import DIGITS, DataInfo
from .models import LABELLED, MODELS, SIGMA_DATA
from .objectives import OBJECTIVES
from .options import check_options, entry_of
from .samplers import SAMPLERS, build_sampler, geometric
from .trainer import DECAYS

__all__ = ["TrainConfig", "configured", "current", "recipe"]

# Entries in configurations of earlier versions: those that no longer exist, and those with another name now.
_RETIRED = ("compile",)
_RENAMED = {"alpha": "reg_alpha", "restart_prob": "reinit_prob"}

# Entries that earlier versions did not have, with what they did.
_ADDED: dict[str, Any] = {
    "objective": "pcd", "model": "mlp", "sampler": "langevin", "objective_options": {}, "model_options": {},
    "sampler_options": {}, "n_classes": 0, "objective_learning_rate": None,
}  # fmt: skip

# What differs from TrainConfig's defaults, by the name of a data set or else by its kind.
_RECIPES: dict[str, dict[str, Any]] = {
    "images": {},
    "plane": {"steps": 2000, "hidden_sizes": (128, 128, 128), "learning_rate": 5e-3},
    "table": {"steps": 1500, "hidden_sizes": (128, 128), "noise_std": 0.2, "drift": 0.02, "cooling": 0.0},
    "breast_cancer": {"steps": 500, "hidden_sizes": (128, 128), "noise_std": 0.2, "drift": 0.02, "cooling": 0.0},
}


# What an objective changes in these, for each kind of data. Noise levels are in units of the states' spread.
_OF_OBJECTIVE: dict[str, Callable[[str], dict[str, Any]]] = {
    "jem": lambda kind: {"reg_alpha": 0.01, "learning_rate": 2e-3},
    "cooperative": lambda kind: {"objective_learning_rate": 2e-3},
    "diffusion_recovery": lambda kind: _without_chains(
        sigmas=_geometric(5.0 * SIGMA_DATA[kind], 0.04 * SIGMA_DATA[kind], 10), sampler_steps=10
    ),
    "dsm": lambda kind: _without_chains(sigma=0.05 * SIGMA_DATA[kind]),
    "multi_dsm": lambda kind: _without_chains(sigmas=_geometric(10.0 * SIGMA_DATA[kind], 0.025 * SIGMA_DATA[kind], 20)),
    "vp_dsm": lambda kind: _without_chains(),
    "ssm": lambda kind: _without_chains(noise_std=0.05 * SIGMA_DATA[kind]),
    "esm": lambda kind: _without_chains(noise_std=0.05 * SIGMA_DATA[kind]),
    "energy_discrepancy": lambda kind: _without_chains(t=(0.25 * SIGMA_DATA[kind]) ** 2),
    "nce": lambda kind: {**_without_chains(noise_ratio=4), "objective_learning_rate": 1e-2},
    "ranking_nce": lambda kind: _without_chains(n_noise=4),
    "flow_contrastive": lambda kind: {**_without_chains(), "objective_learning_rate": 1e-3},
    "infonce": lambda kind: _without_chains(noise_std=0.5 * SIGMA_DATA[kind]),
}

# What was found better in the plane: the objectives without chains take shorter steps, so more of them, and sharper
# noise than in many dims.
_IN_THE_PLANE: dict[str, dict[str, Any]] = {
    "cooperative": {"objective_options": {"latent_dim": 2}},
    "diffusion_recovery": {
        "steps": 1000,
        "learning_rate": 5e-3,
        "objective_options": {"sigmas": (20.0, 9.4, 4.4, 2.1, 0.97, 0.46, 0.21, 0.1), "sampler_steps": 20},
    },
    "dsm": {"steps": 4000},
    "multi_dsm": {"steps": 4000, "learning_rate": 5e-3},
    "vp_dsm": {"steps": 4000, "learning_rate": 5e-3},
    "ssm": {"steps": 4000, "learning_rate": 5e-3},
    "esm": {"steps": 4000, "learning_rate": 5e-3, "hidden_sizes": (128, 128)},
    "energy_discrepancy": {"steps": 4000, "learning_rate": 3e-3, "batch_size": 128},
    "nce": {"learning_rate": 5e-3, "objective_learning_rate": 5e-3, "objective_options": {"noise": "gaussian"}},
    "ranking_nce": {"learning_rate": 5e-3, "objective_options": {"noise": "gaussian"}},
    "flow_contrastive": {"learning_rate": 5e-3, "objective_learning_rate": 3e-3, "objective_options": {"n_layers": 6}},
}


def _without_chains(**options: Any) -> dict[str, Any]:
    """For objectives without chains, whose energies are at temperature 1: fresh chains have a constant noise."""
    return {"learning_rate": 2e-3, "cooling": 0.0, "objective_options": options}


def _geometric(largest: float, smallest: float, n: int) -> tuple[float, ...]:
    """Noise levels, decreasing, rounded to four digits."""
    return tuple(float(f"{sigma:.4g}") for sigma in geometric("levels", largest, smallest, n))


def _changed(found: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of TrainConfig with changes. Options add to those that are there."""
    options = {k: {**found.get(k, {}), **v} for k, v in changes.items() if k.endswith("_options")}
    return {**found, **changes, **options}


def recipe(data: Data, objective: str = "pcd", model: str | None = None, sampler: str | None = None) -> dict[str, Any]:
    """The arguments of TrainConfig for a data set and an objective, the data's description included.

    Args:
        model, sampler: names. None: the first that goes with the objective.
    """
    info, entry = data.info, entry_of("objective", OBJECTIVES, objective)
    found = _RECIPES.get(info.name, _RECIPES[info.kind])
    if objective in _OF_OBJECTIVE:
        found = _changed(found, _OF_OBJECTIVE[objective](info.kind))
    if info.kind == "plane":
        found = _changed(found, _IN_THE_PLANE.get(objective, {}))
    chosen = {"objective": objective, "model": model or entry.models[0], "sampler": sampler or entry.samplers[0]}
    n_classes = int(data.classes.max()) + 1 if chosen["model"] in LABELLED and data.classes is not None else 0
    return {
        "batch_size": min(TrainConfig.batch_size, len(data.train)), **found, **chosen, "n_classes": n_classes,
        "clamp": info.clamp, "data": info,
    }  # fmt: skip


def configured(data: Data, changes: Mapping[str, Any]) -> TrainConfig:
    """The recipe with changes: fields of TrainConfig. Options add to those of the recipe."""
    found = recipe(data, **{k: changes[k] for k in ("objective", "model", "sampler") if k in changes})
    return TrainConfig(**_changed(found, changes))


@dataclass(frozen=True)
class TrainConfig:
    """Every hyper-parameter of a run. The defaults are the recipe for the digits; ``recipe`` has the others.

    With sampler="langevin", chains move by x' = clamp(x - drift clip(dE/dx, grad_clip) + noise xi) in blocks of
    langevin_steps, both in training and when sampling afresh. Within a block the noise is noise_std, and falls linearly
    to 0 over its last part (the fraction cooling), so a block ends with a step without noise. drift = noise_std^2 / 2
    is temperature 1: the energy is then the negative log-density.

    Args:
        data: the data set. seed: of everything random.
        objective, model, sampler: names in OBJECTIVES, MODELS and SAMPLERS (objectives.py, models.py, samplers.py).
        objective_options, model_options, sampler_options: option -> value, for what these build.
        n_classes: of the data, for models that take labels; else 0.
        steps: training iterations. batch_size: data rows per iteration, and chains drawn from the pool.
        hidden_sizes, activation: of an MLP.
        dequantisation: width, in grey levels, of the uniform noise added to images. 1 fills the gaps between levels;
            0 leaves black and white exactly on the bounds of the clamp, where clamped chains lie as well.
        pool_size: persistent chains. reinit_prob: the probability that a drawn chain starts again from noise.
        langevin_steps: steps of the sampler per iteration.
        learning_rate, betas: Adam's. objective_learning_rate: for parameters of the objective, such as log Z; None:
            learning_rate. warmup_steps: over which the learning rate rises from 0. decay: of the learning
            rate, to 0 at the end: "cosine", "linear" or "none".
        reg_alpha: weight of the squared energies in the loss.
        max_grad_norm: the gradient of the weights is clipped to this norm; None: never.
        ema_decay: of the averaged weights. In step t the decay is at most (1 + t) / (10 + t).
        n_fresh: chains from uniform noise that the measures use. fresh_steps: Langevin steps of each.
        on_nonfinite: "raise" ends training when a chain is no longer finite. "reinit" starts that chain again and
            goes on, unless more than a tenth of a batch does so in one step; such a chain's sample is its new start.
        device: "auto" (a GPU if there is one) or any device name of PyTorch.
    """

    data: DataInfo = DIGITS
    seed: int = 0
    objective: str = "pcd"
    model: str = "mlp"
    sampler: str = "langevin"
    objective_options: Mapping[str, Any] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    n_classes: int = 0
    steps: int = 2500
    batch_size: int = 256
    hidden_sizes: tuple[int, ...] = (256, 128)
    activation: str = "silu"
    dequantisation: float = 0.0

    pool_size: int = 10_000
    reinit_prob: float = 0.02
    langevin_steps: int = 20
    drift: float = 0.01125
    noise_std: float = 0.15
    cooling: float = 0.5
    grad_clip: float | None = None
    clamp: tuple[float, float] | None = (0.0, 1.0)

    learning_rate: float = 3e-3
    objective_learning_rate: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 100
    decay: str = "linear"
    reg_alpha: float = 1e-3
    max_grad_norm: float | None = 1.0
    ema_decay: float = 0.999

    n_fresh: int = 1000
    fresh_steps: int = 1000

    on_nonfinite: str = "raise"
    device: str = "auto"
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "pool_size", "langevin_steps", "n_fresh", "fresh_steps"):
            _require(name, getattr(self, name), int, lambda v: v >= 1, "an int >= 1")
        _require("seed", self.seed, int, lambda v: 0 <= v < 2**63, "an int in [0, 2**63)")
        for name in ("drift", "learning_rate"):
            _require(name, getattr(self, name), float, lambda v: v > 0, "a number > 0")
        _require("warmup_steps", self.warmup_steps, int, lambda v: v >= 0, "an int >= 0")
        for name in ("noise_std", "reg_alpha"):
            _require(name, getattr(self, name), float, lambda v: v >= 0, "a number >= 0")
        for name in ("reinit_prob", "cooling", "dequantisation"):
            _require(name, getattr(self, name), float, lambda v: 0 <= v <= 1, "a number in [0, 1]")
        _require("ema_decay", self.ema_decay, float, lambda v: 0 <= v < 1, "a number in [0, 1)")
        if len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        for beta in self.betas:
            _require("betas", beta, float, lambda v: 0 <= v < 1, "two numbers in [0, 1)")
        self._check_names()
        build_sampler(self, 1)  # checks grad_clip, clamp and the sampler's options
        for name in ("max_grad_norm", "objective_learning_rate"):
            if (value := getattr(self, name)) is not None:
                _require(name, value, float, lambda v: v > 0, "a number > 0, or None")
        if self.decay not in DECAYS:
            raise ValueError(f'decay must be "cosine", "linear" or "none", got {self.decay!r}')
        if self.dequantisation > 0 and self.data.kind != "images":
            raise ValueError(f"dequantisation is for images: it must be 0, got {self.dequantisation!r}")
        if self.on_nonfinite not in ("raise", "reinit"):
            raise ValueError(f'on_nonfinite must be "raise" or "reinit", got {self.on_nonfinite!r}')
        if OBJECTIVES[self.objective].pool and self.batch_size > self.pool_size:
            raise ValueError(f"batch_size must be <= pool_size: got {self.batch_size} chains from {self.pool_size}")

    def _check_names(self) -> None:
        objective = entry_of("objective", OBJECTIVES, self.objective)
        for kind, table, allowed in (
            ("model", MODELS, objective.models),
            ("sampler", SAMPLERS, objective.samplers),
        ):
            name = getattr(self, kind)
            check_options(kind, name, entry_of(kind, table, name), getattr(self, f"{kind}_options"))
            if name not in allowed:
                raise ValueError(
                    f"the objective {self.objective} goes with the {kind} {' or '.join(allowed)}, got {name}"
                )
        check_options("objective", self.objective, objective, self.objective_options)

    def to_dict(self) -> dict[str, Any]:
        """For JSON. Data without a layout have no such entry, as in runs of earlier versions."""

        def listed(values: dict[str, Any]) -> dict[str, Any]:
            return {
                k: list(v) if isinstance(v, tuple) else listed(v) if isinstance(v, dict) else v
                for k, v in values.items()
            }

        values = dataclasses.asdict(self)
        if values["data"]["layout"] is None:
            del values["data"]["layout"]
        return listed(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of ``to_dict``. It also takes what earlier versions wrote.

        Raises:
            ValueError: missing, unknown or impossible entries.
        """
        values = current(values)
        names = {field.name for field in dataclasses.fields(cls)}
        if values.keys() != names:
            odd = ", ".join(sorted(values.keys() ^ names))
            raise ValueError(f"these entries of the configuration are missing or unknown: {odd}")

        def tuples(values: Mapping[str, Any]) -> dict[str, Any]:
            return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}

        options = {k: tuples(v) for k, v in values.items() if k.endswith("_options")}
        return cls(**{**tuples(values), **options, "data": DataInfo.from_dict(values["data"])})


def current(values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a configuration by their names of today."""
    return {**_ADDED, **{_RENAMED.get(k, k): v for k, v in values.items() if k not in _RETIRED}}


def _require(name: str, value: Any, kind: type, rule: Callable[[Any], bool], words: str) -> None:
    kinds = (int, float) if kind is float else (kind,)
    right = isinstance(value, kinds) and isinstance(value, bool) == (kind is bool)
    if not right or not rule(value):  # NaN fails every rule
        raise ValueError(f"{name} must be {words}, got {value!r}")
