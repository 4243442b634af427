"""The models of ``fastebm train --model NAME``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..energies import MLPEnergy
from .options import Entry, built

if TYPE_CHECKING:
    from .recipe import TrainConfig

__all__ = ["LABELLED", "MODELS", "build_model"]

# The models that take labels, and so need a number of classes.
LABELLED = ("conditional", "classifier")


def _mlp(config: TrainConfig, **options: Any) -> nn.Module:
    return MLPEnergy(config.data.dim, config.hidden_sizes, config.activation, **options)


MODELS: Mapping[str, Entry] = {
    "mlp": Entry("MLP", _mlp, MLPEnergy, given=("input_size", "hidden_sizes", "activation")),
}


def build_model(config: TrainConfig) -> nn.Module:
    """The energy with the initial weights of the seed. The global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model: nn.Module = built("model", config.model, MODELS[config.model], config, options=config.model_options)
    return model
