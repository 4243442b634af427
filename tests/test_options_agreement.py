"""Heads and sums with every option of the sampler: every path agrees with the float64 reference."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paths import (
    CLASSES,
    FAST_PATHS,
    HEADS,
    IN_MEMORY,
    REGIMES,
    TERMS,
    YARDSTICK,
    advance_fused,
    advance_reference,
    largest,
    make_energy,
    start,
)
from truth import cases, check_agreement

from fastebm import Langevin

# The interpreter computes in NumPy, which warns where a GPU overflows silently.
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(case=cases(), regime=st.sampled_from([*REGIMES, *IN_MEMORY]))
def test_any_energy_with_any_option(device, case, regime):
    check_agreement(device, ("torch", "products", regime), **case)


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(case=cases())
def test_many_energies_with_many_options(device, case):
    check_agreement(device, (*FAST_PATHS, *IN_MEMORY), **case)


@pytest.mark.parametrize(
    ("head", "terms"),
    [
        *(pytest.param(head, (), marks=pytest.mark.slow) for head in HEADS),
        pytest.param("scalar", TERMS, marks=pytest.mark.slow),
        pytest.param("scalar", ("gaussian",), marks=pytest.mark.slow),
        pytest.param("class", ("wide gaussian", "classifier", "slope"), marks=pytest.mark.slow),
        pytest.param("logsumexp", ("linear",), marks=pytest.mark.slow),
    ],
)
def test_all_options_at_once(device, head, terms):
    check_agreement(
        device, (*FAST_PATHS, *IN_MEMORY, "eight warps"), energy=make_energy(37, head=head, terms=terms), dim=37,
        classes=CLASSES if head == "class" else None, n_chains=70, steps=4, thin=2, step_form="schedule",
        noise_form="per_chain", clamp="dims", frozen="chains", sampler={"grad_clip": 0.3, "grad_norm_clip": 0.9},
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["bf16x3", "tf32", "bf16"])
@pytest.mark.parametrize("regime", REGIMES)
def test_products_of_a_head_are_at_the_precision_that_was_asked_for(device, regime, precision):
    """The error of a gradient step is at most the unit roundoff of the operands, times the four products."""
    energy = make_energy(37, head="logsumexp", terms=TERMS).to(device)
    x, counters = start(YARDSTICK, 37, device)
    sampler = Langevin(2.0, 0.0)
    exact = advance_reference(energy, x, sampler, 1, counters, torch.float64)
    done = advance_fused(energy, x, sampler, 1, counters, regime, precision, chunk=16)
    if done is not None:
        roundoff = {"bf16x3": 2.0**-15, "tf32": 2.0**-10, "bf16": 2.0**-7}[precision]
        assert largest(done.x - exact.x) <= 4 * roundoff * largest(exact.x - x)
