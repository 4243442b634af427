"""Estimates of numbers that an energy leaves open: its partition function, and likelihoods.

partition.py  the public calls
result.py     what they return
ladder.py     the path from the base to the energy, and the runs along it
ais.py        annealed importance sampling, as a sampler
normal.py     the base
flow.py       samples and likelihoods by the probability-flow ODE of an energy at every noise level
"""

from .flow import FlowLikelihood, flow_likelihood, probability_flow
from .partition import log_likelihood, log_partition
from .result import LogPartition

__all__ = [
    "FlowLikelihood",
    "LogPartition",
    "flow_likelihood",
    "log_likelihood",
    "log_partition",
    "probability_flow",
]
