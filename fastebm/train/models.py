"""The models of ``fastebm train --model NAME``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.info import SPREAD, DataInfo
from ..energies import (
    ClassConditionalEnergy,
    ClassifierEnergy,
    ConvEnergy,
    MLPEnergy,
    NoiseConditionalEnergy,
    PairEnergy,
    ResNetEnergy,
    energy,
)
from ..energies.noise_conditional import variance_preserving
from .options import Entry, built

if TYPE_CHECKING:
    from .recipe import TrainConfig

__all__ = ["LABELLED", "MODELS", "SIGMA_DATA", "AtLevel", "build_model", "exploding", "noise_range", "row_energy"]

# The models that take labels, and so need a number of classes.
LABELLED = ("conditional", "classifier")

# Standard deviation of states by the kind of data. That of images is rough: the digits' is 0.38.
SIGMA_DATA = {**SPREAD, "images": 0.4}

# Time at which a variance-preserving energy stands for that of the data: sigma is 0.011 there, with the usual betas.
_FIRST_TIME = 1e-3


def _mlp(config: TrainConfig, **options: Any) -> nn.Module:
    return MLPEnergy(config.data.dim, config.hidden_sizes, config.activation, **options)


def _conv(config: TrainConfig, **options: Any) -> nn.Module:
    return ConvEnergy(_image_shape(config.data), activation=config.activation, **options)


def _resnet(config: TrainConfig, **options: Any) -> nn.Module:
    return ResNetEnergy(_image_shape(config.data), activation=config.activation, **options)


def _conditional(config: TrainConfig, *, feature_size: int = 128, **options: Any) -> nn.Module:
    trunk = _network(config, outputs=feature_size, **options)
    return ClassConditionalEnergy(trunk, _n_classes(config), feature_size)


def _classifier(config: TrainConfig, **options: Any) -> nn.Module:
    return ClassifierEnergy(_network(config, outputs=_n_classes(config), **options))


def _noise_conditional(
    config: TrainConfig, *, sigma_data: float | None = None, n_frequencies: int = 2, **options: Any
) -> nn.Module:
    network = _network(config, outputs=config.data.dim, condition_size=1 + 2 * n_frequencies, **options)
    sigma_data = SIGMA_DATA[config.data.kind] if sigma_data is None else sigma_data
    return NoiseConditionalEnergy(network, sigma_data, n_frequencies=n_frequencies, betas=_betas(config))


def _pair(config: TrainConfig, *, feature_size: int = 64, temperature: float = 0.1, **options: Any) -> nn.Module:
    return PairEnergy(_network(config, outputs=feature_size, **options), temperature)


def _network(
    config: TrainConfig,
    *,
    outputs: int,
    trunk: str = "mlp",
    channels: Sequence[int] | None = None,
    spectral_norm: bool = False,
    condition_size: int = 0,
) -> nn.Module:
    """A network of several outputs: an MLP with the configuration's hidden_sizes, or one of images with channels."""
    if trunk == "mlp":
        if channels is not None:
            raise ValueError("model.channels is for model.trunk=conv or resnet: an mlp has hidden_sizes")
        dim = config.data.dim + condition_size  # a condition is appended to the state
        return MLPEnergy(dim, config.hidden_sizes, config.activation, spectral_norm=spectral_norm, outputs=outputs)
    kinds: dict[str, Callable[..., nn.Module]] = {"conv": ConvEnergy, "resnet": ResNetEnergy}
    if trunk not in kinds:
        raise ValueError(f"model.trunk must be mlp, conv or resnet, got {trunk!r}")
    sizes = {} if channels is None else {"channels": channels}
    return kinds[trunk](
        _image_shape(config.data), activation=config.activation, spectral_norm=spectral_norm, outputs=outputs,
        condition_size=condition_size, **sizes,
    )  # fmt: skip


def _image_shape(data: DataInfo) -> tuple[int, ...]:
    if data.kind != "images":
        raise ValueError(f"conv and resnet are for images, and {data.name} has rows of {data.dim} columns: take mlp")
    return data.shape


def _n_classes(config: TrainConfig) -> int:
    if config.n_classes < 2:
        raise ValueError(
            f"the model {config.model} needs classes, and {config.data.name} has none: take digits or mnist5k, or "
            "--data FILE --label NAME"
        )
    return config.n_classes


_OF_RUN = ("input_size", "shape", "hidden_sizes", "activation", "outputs", "condition_size", "config")

MODELS: Mapping[str, Entry] = {
    "mlp": Entry("E(x), an MLP with the widths hidden_sizes", _mlp, MLPEnergy, _OF_RUN),
    "conv": Entry("E(x) of images, convolutions", _conv, ConvEnergy, _OF_RUN),
    "resnet": Entry("E(x) of images, residual blocks", _resnet, ResNetEnergy, _OF_RUN),
    "conditional": Entry("E(x, class)", _conditional, _network, _OF_RUN),
    "classifier": Entry("a classifier as an energy", _classifier, _network, _OF_RUN),
    "noise_conditional": Entry("E(x, noise level), a denoiser", _noise_conditional, _network, _OF_RUN),
    "pair": Entry("E(x, y) of features", _pair, _network, _OF_RUN),
}


def build_model(config: TrainConfig) -> nn.Module:
    """The energy with the initial weights of the seed. The global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model: nn.Module = built("model", config.model, MODELS[config.model], config, options=config.model_options)
    return model


class AtLevel(nn.Module):
    """E(x) = E(x, sigma) at one noise level."""

    def __init__(self, model: nn.Module, sigma: float) -> None:
        super().__init__()
        self.model, self.sigma = model, sigma

    def forward(self, x: Tensor) -> Tensor:
        """(batch, *shape) -> (batch,)."""
        return energy(self.model, x, condition=x.new_full((len(x),), self.sigma))


def row_energy(model: nn.Module, config: TrainConfig) -> nn.Module:
    """The energy of rows alone, E(x): a noise-conditional model at its lowest level; others as they are.

    Raises:
        ValueError: the model has energies of pairs only.
    """
    if config.model == "pair":
        raise ValueError(f"{config.objective} trains energies of pairs of rows: a row has features, and no energy")
    if config.model != "noise_conditional":
        return model
    return AtLevel(exploding(model), noise_range(config)[1])


def noise_range(config: TrainConfig) -> tuple[float, float]:
    """The largest and the smallest sigma at which a noise-conditional energy was trained."""
    if (betas := _betas(config)) is not None:
        alpha, sigma = variance_preserving(torch.tensor([1.0, _FIRST_TIME], dtype=torch.float64), betas)
        largest, smallest = (sigma / alpha).tolist()
        return largest, smallest
    sigmas = config.objective_options["sigmas"]
    return max(sigmas), min(sigmas)


def _betas(config: TrainConfig) -> tuple[float, float] | None:
    """beta_min and beta_max of a variance-preserving energy. None for one of sigma."""
    if config.objective != "vp_dsm":
        return None
    options = config.objective_options
    return options.get("beta_min", 0.1), options.get("beta_max", 20.0)


def exploding(model: nn.Module) -> nn.Module:
    """A noise-conditional energy as E(x, sigma) of x + sigma xi, also if it was trained on alpha(t) x + sigma(t) xi.

    It shares the weights.
    """
    found: Any = copy.copy(model)
    found.betas = None
    return found  # type: ignore[no-any-return]
