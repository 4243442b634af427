"""Every measure that the data and the energy of a run allow, by name: ``fastebm evaluate``.

A measure is a function of a ``Subject`` and returns numbers by name. It raises a ValueError, in words, where the data
or the energy do not allow it.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import evaluate
from ..backends.settle import NonFiniteError
from ..data.dataset import Data, Images
from ..energies import ClassifierEnergy
from ..energies.conditions import condition_parameter, unwrapped
from ..estimates import flow_likelihood, log_partition
from ..samplers import MALA
from .apply import energies_of
from .models import AtLevel, noise_range
from .recipe import TrainConfig
from .report import OnWork, held_out_states

__all__ = ["MEASURES", "Subject", "measured"]

# Annealed importance sampling. On the recipe of the digits the bounds of log Z are then 7 nats apart (0.16 bits a dim)
# after 10 s on one core; with 1,000 temperatures and 256 chains they are 13 nats apart after 5 s.
_TEMPERATURES, _AIS_CHAINS = 4000, 128

# Rows whose likelihood is computed by the probability-flow ODE, and the most dims for which the trace is exact: that
# takes one backward pass per dim, and Hutchinson's estimate takes one in all.
_FLOW_ROWS, _EXACT_DIMS = 500, 16

# The Stein discrepancy needs a density that vanishes at the bounds. It is refused if more of the values lie on them.
_MOST_ON_BOUNDS = 1e-3

# Radii of the attacks, in the units of states (images: [0, 1]).
_RADII = {"linf": (0.05, 0.1), "l2": (0.25, 0.5, 1.0)}


@dataclass(frozen=True, eq=False)
class Subject:
    """What is measured.

    Args:
        model: the energy of rows (``row_energy``), on the device where it is evaluated. config, data: of its run.
        samples: (n, dim) fresh states on the CPU. labels: (n,) the classes that they were drawn for, if they were.
        seed: of everything random here.
        on_work: see ``OnWork``.
    """

    model: nn.Module
    config: TrainConfig
    data: Data
    samples: Tensor
    labels: Tensor | None = None
    seed: int = 0
    on_work: OnWork = lambda words, done, total: None

    @cached_property
    def rows(self) -> dict[str, NDArray[Any]]:
        """States of "train", "test" and "samples" that can be compared: those of images are rounded to grey levels."""
        if isinstance(self.data, Images):
            levels = {"train": self.data.train, "test": self.data.test, "samples": self.data.quantise(self.samples)}
            return {name: (k / self.data.levels).numpy() for name, k in levels.items()}
        return {"train": self.data.train.numpy(), "test": self.data.test.numpy(), "samples": self.samples.numpy()}

    @cached_property
    def energies(self) -> dict[str, NDArray[Any]]:
        """Energies of held-out rows ("test"), and of states that an energy should tell from them."""
        self.check_density()
        states = held_out_states(self.data, self.config)
        return {name: energies_of(self.model, x).numpy() for name, x in states.items()}

    @cached_property
    def cells(self) -> tuple[Tensor, Tensor]:
        """Held-out rows as states with a density: those of images are uniform in their cells. And the log volumes."""
        if isinstance(self.data, Images):
            generator = torch.Generator().manual_seed(self.seed)
            return evaluate.uniform_in_cells(self.data.test, self.data.levels, generator, self.data.info.clamp)
        return self.data.test, torch.zeros(len(self.data.test), dtype=torch.float64)

    @cached_property
    def judge(self) -> evaluate.Judge:
        """A classifier trained on the labelled images of the run."""
        images = self.images()
        train = torch.from_numpy(self.rows["train"])
        return evaluate.train_judge(
            train, images.train_labels, images.shape, seed=self.seed,
            on_epoch=lambda done, total: self.on_work("training the judge", done, total),
        )  # fmt: skip

    def images(self) -> Images:
        if not isinstance(self.data, Images):
            raise ValueError(f"it needs labelled images, and {self.data.info.name} is a {self.data.info.kind}")
        return self.data

    def classifier(self) -> nn.Module:
        model = unwrapped(self.model)
        if not isinstance(model, ClassifierEnergy):
            raise ValueError(f"it needs a classifier (ClassifierEnergy), got {type(model).__name__}")
        return model.classifier

    def check_density(self) -> None:
        """Refuse an energy that is one density per condition."""
        parameter = condition_parameter(self.model, "condition")
        if parameter is not None and parameter.default is parameter.empty:
            raise ValueError(f"the energy has a condition, {parameter.name}, and so it is no density of states alone")

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def measured(subject: Subject, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The measures of these names. Each: its values; or "skipped" and why. And its "seconds", and "warnings"."""
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        subject.on_work(f"measuring {name}", 0, 0)
        started = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            try:
                result = MEASURES[name](subject)
            except (ValueError, NonFiniteError) as error:
                result = {"skipped": str(error)}
        if caught:
            result["warnings"] = [str(warning.message) for warning in caught]
        results[name] = {**result, "seconds": round(time.perf_counter() - started, 2)}
    return results


# -- samples against data -----------------------------------------------------------------------------------


def _two_sample(subject: Subject) -> dict[str, Any]:
    def on_fold(done: int, total: int) -> None:
        subject.on_work("measuring two_sample", done, total)

    rows = subject.rows
    accuracy = evaluate.two_sample_accuracy(rows["test"], rows["samples"], seed=subject.seed, on_fold=on_fold)
    return {"accuracy": accuracy}


def _mmd(subject: Subject) -> dict[str, Any]:
    real, train, samples = _as_many(subject.rows["test"], subject.rows["train"], subject.rows["samples"])
    bandwidths = evaluate.median_bandwidths(real, train)
    return {
        "mmd_squared": evaluate.mmd_squared(real, samples, bandwidths=bandwidths),
        "mmd_squared_of_train": evaluate.mmd_squared(real, train, bandwidths=bandwidths),
        "bandwidths": bandwidths,
    }


def _manifold(subject: Subject) -> dict[str, Any]:
    """By the features of the judge for labelled images, else by states."""
    real, samples = _as_many(subject.rows["test"], subject.rows["samples"])
    if isinstance(subject.data, Images):
        real, samples = (subject.judge.features(torch.from_numpy(x)).numpy() for x in (real, samples))
    space = "features of the judge" if isinstance(subject.data, Images) else "states"
    return {**evaluate.manifold_shares(real, samples)._asdict(), "space": space, "rows": len(real)}


def _judge(subject: Subject) -> dict[str, Any]:
    images, judge = subject.images(), subject.judge
    real, train, samples = map(
        torch.from_numpy, _as_many(subject.rows["test"], subject.rows["train"], subject.rows["samples"])
    )
    features = judge.features(real)
    probabilities = judge.probabilities(samples)
    by_class = {}
    if subject.labels is not None:
        by_class["judge_accuracy_of_samples"] = judge.accuracy(samples, subject.labels[: len(samples)])
    return {
        **by_class,
        "judge_accuracy": judge.accuracy(torch.from_numpy(subject.rows["test"]), images.test_labels),
        "judge_frechet_distance": evaluate.frechet_distance(features, judge.features(samples)),
        "judge_frechet_distance_of_train": evaluate.frechet_distance(features, judge.features(train)),
        "judge_inception_score": evaluate.inception_score(probabilities),
        "judge_inception_score_of_test": evaluate.inception_score(judge.probabilities(real)),
        "judge_class_shares": probabilities.mean(0).tolist(),
        "rows": len(real),
    }


def _as_many(*sets: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    """The first rows of each, as many as the smallest has."""
    n = min(map(len, sets))
    return tuple(x[:n] for x in sets)


# -- the energy ---------------------------------------------------------------------------------------------


def _stein(subject: Subject) -> dict[str, Any]:
    """Of the samples and of held-out rows."""
    subject.check_density()
    lo, hi = subject.data.info.clamp
    sets = {"samples": subject.samples, "test": subject.cells[0]}
    for name, x in sets.items():
        share = float(((x <= lo) | (x >= hi)).double().mean())
        if share > _MOST_ON_BOUNDS:
            raise ValueError(
                f"it needs a density that vanishes at the bounds ({lo:g}, {hi:g}) of the states, and {share:.1%} of "
                f"the values of {name} lie on them"
            )
    found = {name: evaluate.kernel_stein_discrepancy(subject.model, x) for name, x in sets.items()}
    return {f"ksd_squared_{name}": ksd.unbiased for name, ksd in found.items()}


def _detection(subject: Subject) -> dict[str, Any]:
    result = {}
    for name, outliers in subject.energies.items():
        if name != "test":
            result[f"auroc_{name}"] = evaluate.auroc(subject.energies["test"], outliers)
            result[f"fpr95_{name}"] = evaluate.fpr_at_tpr(subject.energies["test"], outliers)
    return result


def _likelihood(subject: Subject) -> dict[str, Any]:
    subject.check_density()
    states, volumes = subject.cells
    log_z = log_partition(
        subject.model, input_size=subject.data.dim, sampler=MALA(0.1, clamp=subject.data.info.clamp),
        n_temperatures=_TEMPERATURES, n_chains=_AIS_CHAINS, seed=subject.seed, device=subject.device,
    )  # fmt: skip
    held_out = evaluate.held_out_likelihood(subject.model, states.to(subject.device), log_z)
    of_bounds = {"log_z": log_z.log_z, "log_z_upper": log_z.upper, "ess": log_z.ess, **dataclasses.asdict(held_out)}
    return of_bounds | _bits(subject, volumes, bits_per_dim_lower=held_out.upper, bits_per_dim_upper=held_out.lower)


def _quadrature(subject: Subject) -> dict[str, Any]:
    subject.check_density()
    if subject.data.info.kind != "plane":
        raise ValueError(f"it needs states in the plane, and these have {subject.data.dim} dims")
    clamp = subject.data.info.clamp
    log_z, coarse = (evaluate.log_z_by_quadrature(subject.model, clamp, panels=panels) for panels in (64, 32))
    mean = -float(subject.energies["test"].mean(dtype=np.float64)) - log_z
    return {"log_z": log_z, "log_z_with_half_the_panels": coarse, "mean": mean}


def _flow(subject: Subject) -> dict[str, Any]:
    """Through all noise levels, whose energies together are the model; ``likelihood`` has the last level alone."""
    if not isinstance(subject.model, AtLevel):
        raise ValueError(f"it needs an energy of states and noise levels, got {subject.config.model}")
    states, volumes = (part[:_FLOW_ROWS] for part in subject.cells)
    largest, smallest = noise_range(subject.config)
    found = flow_likelihood(
        subject.model.model, states.to(subject.device), sigmas=(smallest, largest),
        n_probes=None if subject.data.dim <= _EXACT_DIMS else 1, seed=subject.seed,
    ).log_likelihood  # fmt: skip
    mean, error = float(found.mean()), float(found.std()) / len(found) ** 0.5
    return {"mean": mean, "standard_error": error, "rows": len(found), **_bits(subject, volumes, bits_per_dim=mean)}


def _kernel_density(subject: Subject) -> dict[str, Any]:
    """A density estimate without an energy, to compare ``likelihood`` with."""
    states, volumes = subject.cells
    train = subject.rows["train"]
    if isinstance(subject.data, Images):
        generator = torch.Generator().manual_seed(subject.seed + 1)
        train = evaluate.uniform_in_cells(
            subject.data.train, subject.data.levels, generator, subject.data.info.clamp
        )[0].numpy()  # fmt: skip
    log_density, bandwidth = evaluate.kernel_density(train, states.numpy(), seed=subject.seed)
    mean = float(log_density.mean())
    return {"mean": mean, "bandwidth": bandwidth, **_bits(subject, volumes, bits_per_dim=mean)}


def _bits(subject: Subject, volumes: Tensor, **likelihoods: float) -> dict[str, Any]:
    """Bits per dim in place of log-likelihoods, by name; for images alone."""
    if not isinstance(subject.data, Images):
        return {}
    nats = torch.tensor(list(likelihoods.values()), dtype=torch.float64)
    bits = evaluate.bits_per_dim(nats, volumes.mean().expand(len(nats)), subject.data.dim)
    return dict(zip(likelihoods, bits.tolist(), strict=True))


# -- classifiers --------------------------------------------------------------------------------------------


def _calibration(subject: Subject) -> dict[str, Any]:
    classifier, images = subject.classifier(), subject.images()
    with torch.no_grad():
        logits = classifier(torch.from_numpy(subject.rows["test"]).to(subject.device)).cpu()
    probabilities, labels = logits.softmax(1), images.test_labels
    return {
        "accuracy": float((logits.argmax(1) == labels).double().mean()),
        "calibration_error": evaluate.calibration_error(probabilities, labels),
        "reliability_curve": evaluate.reliability_curve(probabilities, labels)._asdict(),
    }


def _robustness(subject: Subject) -> dict[str, Any]:
    classifier, images = subject.classifier(), subject.images()
    x, labels = (v.to(subject.device) for v in (torch.from_numpy(subject.rows["test"]), images.test_labels))
    return {
        f"accuracy_{norm}_{radius:g}": evaluate.pgd_accuracy(
            classifier, x, labels, epsilon=radius, norm=norm, clamp=images.info.clamp, seed=subject.seed
        )
        for norm, radii in _RADII.items()
        for radius in radii
    }


MEASURES: dict[str, Callable[[Subject], dict[str, Any]]] = {
    "two_sample": _two_sample,
    "mmd": _mmd,
    "manifold": _manifold,
    "judge": _judge,
    "stein": _stein,
    "detection": _detection,
    "likelihood": _likelihood,
    "quadrature": _quadrature,
    "flow": _flow,
    "kernel_density": _kernel_density,
    "calibration": _calibration,
    "robustness": _robustness,
}
