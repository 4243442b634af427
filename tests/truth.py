"""The float64 run that paths are compared with, and how far a path may be from it."""

import itertools

import torch
from fastebm.bench.problem import halves
from hypothesis import strategies as st
from paths import (
    HEADS,
    TERMS,
    ULP,
    YARDSTICK,
    advance,
    advance_reference,
    begin,
    first_rows,
    first_steps_of,
    free_gradient,
    largest,
    make_energy,
    make_sampler,
    per_dim_bounds,
)
from torch import nn

from fastebm import ClassifierEnergy, SumEnergy
from fastebm.backends.choose import interpreted
from fastebm.energies import ACTIVATIONS
from fastebm.rng import Stream, normal
from fastebm.targets.autograd import Energy
from fastebm.targets.description import describe
from fastebm.targets.mlp import NotAnMLP

KINKED = ("relu", "leaky_relu")  # their slopes jump at 0: there rounding may choose the slope


def where_the_gradient_is_taken(state, t, sampler, steps, counters):
    """The state of step t in float64; with noise_first, after the noise and its clamp."""
    if not sampler.noise_first:
        return state
    _, noise_std = (
        c.expand(-1, steps) for c in sampler.coefficients(len(state), steps, dtype=state.dtype, device=state.device)
    )
    ages, dim = counters["first_steps"] + t, state.shape[1]
    noise = normal(counters["seed"], Stream.LANGEVIN, counters["numbers"], ages, dim, dtype=state.dtype)
    noisy = state + noise_std[:, t, None] * noise
    if sampler.clamp_noise and sampler.clamp is not None:
        noisy = noisy.clamp(*sampler.box.on(dim, dtype=state.dtype, device=state.device))
    return noisy if counters.get("frozen") is None else torch.where(counters["frozen"], state, noisy)


class Truth:
    """The float64 trajectory of a run, and tolerances from the error of plain float32 PyTorch."""

    def __init__(self, energy, x, sampler, steps, counters):
        self.states = [x.flatten(1).double()]
        for t in range(1, steps + 1):
            self.states.append(advance_reference(energy, x, first_steps_of(sampler, t), t, counters, torch.float64).x)
        seen = [where_the_gradient_is_taken(self.states[t], t, sampler, steps, counters) for t in range(steps)]
        self.seen = [*seen, self.states[-1]]
        exact, labels = Energy(energy, x.shape[1:], torch.float64), counters.get("labels")
        self.energy = exact(self.states[-1], labels)
        gradients = [exact.gradient(state, labels) for state in self.seen]
        self.sure = self._away_from_kinks(energy)
        a, _ = sampler.coefficients(len(x), steps)
        scale = max(map(largest, (*self.states, *self.seen))) + (largest(a) if steps else 0) * max(
            map(largest, gradients)
        )
        plain = advance_reference(energy, x, sampler, steps, counters)
        self.rounding = 2 * steps * ULP * scale
        self.tolerance = 2 * largest((plain.x - self.states[-1])[self.sure]) + self.rounding
        # an energy sums terms of size 1, and an error of the state changes it by up to |dE/dx|_1 times that error
        slope = float(gradients[-1].abs().sum(dim=1).max())
        self.energy_tolerance = (
            2 * largest((plain.energy - self.energy)[self.sure])
            + 2 * ULP * max(1.0, largest(self.energy))
            + self.rounding * slope / x[0].numel() ** 0.5
        )

    def _away_from_kinks(self, energy):
        """Chains that are far enough from all kinks for rounding not to matter."""
        sure = torch.ones(len(self.states[0]), dtype=torch.bool, device=self.states[0].device)
        try:
            description = describe(energy).to(sure.device, torch.float64)
        except NotAnMLP:
            return sure
        for mlp, h in itertools.product(description.mlps, self.seen):
            for weight, bias, activation in zip(mlp.weights[:-1], mlp.biases[:-1], mlp.activations, strict=True):
                z = nn.functional.linear(h, weight, bias)
                if activation.name in KINKED:
                    sure &= z.abs().amin(dim=1) > 3e-5
                h = activation.forward(z, torch.empty_like(z))
        return sure

    def check(self, done):
        n = len(done.x)
        sure = self.sure[:n]
        assert done.x.isfinite().all()
        assert done.energy.isfinite().all()
        assert torch.equal(done.first_bad, torch.full_like(done.first_bad, -1))
        if sure.any():
            assert largest((done.x - self.states[-1][:n])[sure]) <= self.tolerance
            assert largest((done.energy - self.energy[:n])[sure]) <= self.energy_tolerance


# -- precisions --------------------------------------------------------------------------------------------


def plain_product(a, w, precision):
    """a @ w in float32 of operands rounded to the precision. bf16x3 leaves out the product of the two low halves."""
    a, w = (halves(v, precision, in_kernel=v is a, on_gpu=not interpreted()) for v in (a, w))
    return sum(a[i] @ w[j] for i in range(len(a)) for j in range(len(w)) if i + j < 2)


def plain_energy_and_gradient(mlp, x, precision):
    """E and dE/dx by plain PyTorch at a precision. The head is not a matrix product, so it is not rounded."""
    h, zs = x, []
    for weight, bias, activation in zip(mlp.weights[:-1], mlp.biases[:-1], mlp.activations, strict=True):
        zs.append(plain_product(h, weight.t(), precision) + bias)
        h = activation.forward(zs[-1], torch.empty_like(zs[-1]))
    energy = (h @ mlp.weights[-1].t() + mlp.biases[-1]).squeeze(1)
    g = mlp.weights[-1].expand_as(h)
    for weight, z, activation in zip(reversed(mlp.weights[:-1]), reversed(zs), reversed(mlp.activations), strict=True):
        g = plain_product(activation.backward(g, z, torch.empty_like(z)), weight, precision)
    return energy, g


# -- agreement ----------------------------------------------------------------------------------------------------


class FullTruth(Truth):
    """Truth, with trajectories and telemetry computed by the formulas of the sampler.

    Counts of clipped and clamped steps are compared for chains that stay clear of each bound by ten times the
    tolerance.
    """

    def __init__(self, energy, x, sampler, steps, counters, thin):
        super().__init__(energy, x, sampler, steps, counters)
        self.steps, self.thin, n, dim = steps, thin, *x.shape
        if isinstance(energy, SumEnergy):  # terms may cancel, but their rounding errors do not
            value = Energy(energy, (dim,), torch.float64)
            sizes = self._sizes_of_terms(energy, self.states[-1], counters.get("labels"))
            assert torch.all(sizes >= value(self.states[-1], counters.get("labels")).abs() * (1 - 1e-9))
            self.energy_tolerance += 4 * ULP * largest(sizes)
        plain = advance_reference(energy, x, sampler, steps, counters, thin=1, telemetry=True)
        for t in range(steps):
            error = largest((plain.trajectory[:, t] - self.states[t + 1])[self.sure])
            self.tolerance = max(self.tolerance, 2 * error + self.rounding)

        drift, noise_std = (
            c.expand(-1, steps) for c in sampler.coefficients(n, steps, dtype=torch.float64, device=x.device)
        )
        lo, hi = (
            (-torch.inf, torch.inf)
            if sampler.box is None
            else sampler.box.on(dim, dtype=torch.float64, device=x.device)
        )
        self.clipped, self.clamped = (torch.zeros(n, device=x.device) for _ in range(2))
        self.clear = self.sure.clone()
        self.grad_norm, self.norm_tolerance = torch.full((n,), torch.nan, device=x.device), 0.0
        for t in range(steps):
            state = self.seen[t]
            grad = free_gradient(energy, state, counters)
            error = (free_gradient(energy, state + self._perturbation(state), counters) - grad)[self.sure]
            near = max(10 * largest(error), 1e-5)
            bounded, clipped = grad, torch.zeros(n, dtype=torch.bool, device=x.device)
            if sampler.grad_clip is not None:
                bounded = grad.clamp(-sampler.grad_clip, sampler.grad_clip)
                clipped = (grad.abs() > sampler.grad_clip).any(dim=1)
                self.clear &= ((grad.abs() - sampler.grad_clip).abs() > near).all(dim=1)
            if sampler.grad_norm_clip is not None:
                norm = torch.linalg.vector_norm(bounded, dim=1)
                clipped = clipped | (norm > sampler.grad_norm_clip)
                self.clear &= (norm - sampler.grad_norm_clip).abs() > near * dim**0.5
                bounded = bounded * (sampler.grad_norm_clip / norm.clamp_min(sampler.grad_norm_clip))[:, None]
            moved = state - drift[:, t, None] * bounded
            if not sampler.noise_first:
                ages = counters["first_steps"] + t
                moved += noise_std[:, t, None] * normal(
                    counters["seed"], Stream.LANGEVIN, counters["numbers"], ages, dim, dtype=torch.float64
                )
            out, edge = (moved < lo) | (moved > hi), torch.minimum((moved - lo).abs(), (moved - hi).abs())
            sharp = edge <= max(10 * self.tolerance, 1e-5)
            if counters.get("frozen") is not None:
                out, sharp = out & ~counters["frozen"], sharp & ~counters["frozen"]
            self.clear &= ~sharp.any(dim=1)
            self.clipped += clipped
            self.clamped += out.any(dim=1)
            self.grad_norm = torch.linalg.vector_norm(grad, dim=1)
            largest_norm = largest(self.grad_norm)
            self.norm_tolerance = float(torch.linalg.vector_norm(error, dim=1).max()) if error.numel() else 0.0
        if steps > 0:
            measured = largest((plain.telemetry["grad_norm"] - self.grad_norm)[self.sure])
            self.norm_tolerance += 2 * measured + 4 * ULP * largest_norm

    def _perturbation(self, state):
        """The tolerance with random signs: an error that the state may have."""
        generator = torch.Generator().manual_seed(5)
        return (torch.randint(0, 2, state.shape, generator=generator) * 2 - 1).to(state) * self.tolerance

    def _sizes_of_terms(self, energy, x, labels):
        if isinstance(energy, SumEnergy):
            pairs = zip(energy.energies, energy.weights.double().abs(), strict=True)
            return sum(weight * self._sizes_of_terms(e, x, labels) for e, weight in pairs)
        return Energy(energy, x.shape[1:], torch.float64)(
            x, labels if isinstance(energy, ClassifierEnergy) else None
        ).abs()

    def check(self, done):
        super().check(done)
        n = len(done.x)
        sure, clear, steps = self.sure[:n], self.clear[:n], max(self.steps, 1)
        assert done.trajectory.shape == (n, self.steps // self.thin, done.x.shape[1])
        for k in range(self.steps // self.thin):
            error = (done.trajectory[:, k] - self.states[(k + 1) * self.thin][:n])[sure]
            assert not error.isnan().any()
            assert largest(error) <= self.tolerance
        norm, clipped, clamped = done.telemetry.values()
        if self.steps == 0:
            assert norm.isnan().all()
        else:
            assert not norm.isnan().any()
            assert largest((norm - self.grad_norm[:n])[sure]) <= self.norm_tolerance
        for share, count in ((clipped, self.clipped), (clamped, self.clamped)):
            assert not share.isnan().any()
            assert largest((share * steps - count[:n])[clear]) <= 4 * ULP * steps


def check_agreement(
    device, paths, *, n_chains, steps, dim, clamp, frozen, classes, step_form, noise_form, thin, sampler, energy,
    move=advance,
):  # fmt: skip
    n_all = max(n_chains, YARDSTICK)
    bounds = {
        "none": None, "numbers": (-1.0, 0.7), "dims": per_dim_bounds(dim), "mixed": (-0.8, per_dim_bounds(dim)[1]),
    }[clamp]  # fmt: skip
    sampler = make_sampler(n_all, steps, step_form=step_form, noise_form=noise_form, clamp=bounds, **sampler)
    energy = energy.to(device)
    x, counters = begin(n_all, dim, device, classes=classes, frozen=frozen)
    thin = thin if steps % thin == 0 else 1
    truth = FullTruth(energy, x, sampler, steps, counters, thin)
    x, sampler, counters = first_rows(n_chains, x, sampler, counters)
    for path in paths:
        if (done := move(path, energy, x, sampler, steps, counters, thin=thin, telemetry=True)) is not None:
            truth.check(done)


ORDERS = ({}, {"noise_first": True}, {"noise_first": True, "clamp_noise": True})


@st.composite
def cases(draw):
    """Arguments of check_agreement."""
    dim = draw(st.sampled_from([1, 2, 3, 17, 33, 63, 70]) | st.integers(1, 70))
    head, classes = draw(st.sampled_from(HEADS)), draw(st.sampled_from([1, 2, 5, 17]))
    terms = draw(st.lists(st.sampled_from(TERMS), max_size=4))
    return {
        "energy": make_energy(
            dim,
            draw(st.lists(st.sampled_from([1, 3, 16, 17, 33]), min_size=1, max_size=3)),
            draw(st.sampled_from(sorted(ACTIVATIONS))),
            head,
            classes,
            terms,
        ),
        "dim": dim,
        "classes": min(classes, 4 if "classifier" in terms else classes) if head == "class" else None,
        "n_chains": draw(st.sampled_from([1, 7, 63, 64, 65, 130])),
        "steps": draw(st.sampled_from([2, 3, 4, 1, 0])),
        "step_form": draw(st.sampled_from(["number", "schedule", "per_chain"])),
        "noise_form": draw(st.sampled_from(["none", "number", "schedule", "per_chain"])),
        "thin": draw(st.sampled_from([1, 2, 3])),
        "clamp": draw(st.sampled_from(["none", "numbers", "dims", "mixed"])),
        "frozen": draw(st.sampled_from([None, "dims", "chains"])),
        "sampler": {
            "grad_clip": draw(st.sampled_from([None, 0.3])),
            "grad_norm_clip": draw(st.sampled_from([None, 0.8, 20.0])),
            **draw(st.sampled_from(ORDERS)),
        },
    }  # fmt: skip
