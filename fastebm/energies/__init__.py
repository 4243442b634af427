"""Energies: modules (batch, *shape) -> (batch,) or (batch, 1), one number per state.

Any such nn.Module or function is an energy. Here are the ones that fastebm knows, and what it asks of all others.
"""

from .activations import ACTIVATIONS, Activation
from .base import energy, first_tensor
from .class_conditional import ClassConditionalEnergy
from .classifier import ClassifierEnergy
from .compose import Negative, SumEnergy, n_classes, shape_of, takes_condition
from .conv import ConvEnergy
from .functions import EnergyLike
from .gaussian import GaussianEnergy
from .mlp import MLPEnergy, build, build_energy_fn
from .noise_conditional import NoiseConditionalEnergy
from .pair import PairEnergy
from .resnet import ResNetEnergy

__all__ = [
    "ACTIVATIONS",
    "Activation",
    "ClassConditionalEnergy",
    "ClassifierEnergy",
    "ConvEnergy",
    "EnergyLike",
    "GaussianEnergy",
    "MLPEnergy",
    "Negative",
    "NoiseConditionalEnergy",
    "PairEnergy",
    "ResNetEnergy",
    "SumEnergy",
    "build",
    "build_energy_fn",
    "energy",
    "first_tensor",
    "n_classes",
    "shape_of",
    "takes_condition",
]
