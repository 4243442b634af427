"""The problem that a case's contestants share: energy, start, sampler; and what a right answer is.

A contestant must pass two comparisons before it is timed:

- one step without noise, from the case's own start, against float64: the energy's gradient, the drift, the clamp;
- the law of a few steps with noise against that of ``backends/reference.py``. For fastebm itself, whose noise is known,
  the states themselves are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from itertools import combinations

import torch
from fastebm.bench.cases import Case
from torch import Tensor, nn

from fastebm import Langevin, MLPEnergy, energy
from fastebm.backends import Chains, reference
from fastebm.backends.choose import interpreted
from fastebm.targets.autograd import Autograd, Energy
from fastebm.targets.mlp import MLP, NotAnMLP, read_mlp

SEED = 1
NOISE_SEED = 2  # for PyTorch's global generator: with the seed of the start, the noise would repeat the start
ULP = torch.finfo(torch.float32).eps
GATE_STEPS = 3
GATE_ROWS = 128
# Error of the kernel's fast noise: the GPU's log2 is 2^-22 off, and r is a root of it (tests/test_noise.py).
NOISE_ERROR = 1e-3
# For the test of the law: independent runs of the reference, and normal numbers (chains x dims) per run.
LAW_COPIES, LAW_NORMALS = 4, 1 << 16
LAW_CHAINS = (512, 4096)  # at least, at most
# Rate of false alarms. Seeds are fixed, so a correct contestant that passes once passes always.
LAW_ALPHA = 1e-6


class Missing(Exception):
    """Raised with the reason why a contestant can't run here."""


# -- energies ------------------------------------------------------------------------------------------------


class Gaussian(nn.Module):
    """E(x) = x^T P x / 2; P has eigenvalues from 1 to ``condition`` in geometric steps, in random directions."""

    def __init__(self, dim: int, condition: float = 10.0) -> None:
        super().__init__()
        rotation, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))
        values = torch.logspace(0.0, math.log10(condition), dim, dtype=torch.float64)
        self.precision = nn.Parameter(((rotation * values) @ rotation.T).float())

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * ((x @ self.precision) * x).sum(dim=1, keepdim=True)

    def stationary_covariance(self, drift: float, noise_std: float) -> Tensor:
        """(dim, dim) float64: b^2 [a P (2 I - a P)]^-1, exact for the chain with these steps."""
        step = drift * self.precision.detach().double()
        return noise_std**2 * torch.linalg.inv(step @ (2 * torch.eye(len(step), dtype=torch.float64) - step))


class Mixture(nn.Module):
    """E(x) = -log sum_k exp(-|x - m_k|^2 / 2): two unit Gaussians of equal weight, ``distance`` apart along x_1."""

    def __init__(self, dim: int, distance: float = 3.0) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.zeros(2, dim))
        with torch.no_grad():
            self.means[:, 0] = torch.tensor([-distance / 2, distance / 2])

    def forward(self, x: Tensor) -> Tensor:
        distances = (x[:, None] - self.means).square().sum(dim=2)
        return -torch.logsumexp(-0.5 * distances, dim=1, keepdim=True)


class Banana(nn.Module):
    """E(x) = x_1^2 / 2 + (x_2 - c (x_1^2 - 1))^2 / (2 s^2): x_1 = z_1 and x_2 = s z_2 + c (z_1^2 - 1), z ~ N(0, I)."""

    curvature, std = 0.5, 0.5  # c and s
    variances = (1.0, std**2 + 2 * curvature**2)  # of x_1 and x_2, whose means are 0

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.unbind(dim=1)
        return (a.square() + ((b - self.curvature * (a.square() - 1)) / self.std).square()) / 2

    def draw(self, z: Tensor) -> Tensor:
        """Standard normals (n, 2) -> exact draws (n, 2)."""
        a, b = z.unbind(dim=1)
        return torch.stack([a, self.std * b + self.curvature * (a.square() - 1)], dim=1)


def _conv(dim: int, channels: tuple[int, ...]) -> nn.Module:
    side, below, layers = math.isqrt(dim), 1, []
    for n in channels:
        layers += [nn.Conv2d(below, n, 3, stride=2, padding=1), nn.SiLU()]
        side, below = (side + 1) // 2, n
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(below * side**2, 1))


@cache
def make_energy(kind: str, dim: int, widths: tuple[int, ...], device: torch.device) -> nn.Module:
    """An energy whose gradient is as large as the state. With PyTorch's initial weights a wrong gradient would be too
    small to notice."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        if kind in ("gaussian", "mixture"):
            model: nn.Module = (Gaussian if kind == "gaussian" else Mixture)(dim)
        else:
            model = MLPEnergy(dim, widths) if kind == "mlp" else _conv(dim, widths)
            for p in model.parameters():
                p.mul_(3.0)
    return model.to(device).eval().requires_grad_(False)


def gradient_of(model: nn.Module, x: Tensor) -> Tensor:
    """dE/dx of each chain by autograd, with the model computed in the dtype of x: (n, *shape) -> (n, *shape)."""
    parameters = {name: p.to(x.dtype) for name, p in model.named_parameters()}
    x = x.detach().requires_grad_()
    # a clone: FlopCounterMode can't track a module whose input is a leaf
    return torch.autograd.grad(energy(model, x.clone(), parameters).sum(), x)[0]


# -- the problem ---------------------------------------------------------------------------------------------


@dataclass
class Problem:
    """A case on a device.

    x0: (n_chains, *shape) float32, the start.
    dry: only the logic matters, so nothing is compiled for real.
    gate_rows: chains that the gate checks at the start, in the middle and at the end of the batch.
    """

    case: Case
    device: torch.device
    dry: bool = False
    gate_rows: int = GATE_ROWS
    energy: nn.Module = field(init=False)
    x0: Tensor = field(init=False)

    def __post_init__(self) -> None:
        case = self.case
        self.energy = make_energy(case.kind, case.dim, case.widths, self.device)
        generator = torch.Generator(self.device).manual_seed(SEED)
        size = (case.n_chains, *case.shape)
        if case.clamp is not None:
            lo, hi = case.clamp
            self.x0 = torch.rand(size, generator=generator, device=self.device) * (hi - lo) + lo
            return
        # close to the stationary law, so that there is no burn-in
        self.x0 = torch.randn(size, generator=generator, device=self.device)
        if isinstance(self.energy, Gaussian):
            covariance = self.energy.stationary_covariance(case.drift, case.noise_std)
            self.x0 = self.x0 @ torch.linalg.cholesky(covariance).T.to(self.x0)
        elif isinstance(self.energy, Mixture):
            self.x0 += self.energy.means[torch.arange(case.n_chains, device=self.device) % 2]

    def rule(self, noise_std: float) -> Langevin:
        return Langevin.from_drift_and_noise(self.case.drift, noise_std, clamp=self.case.clamp)

    @cached_property
    def mlp(self) -> MLP | None:
        """The energy's layers; None if it is not an MLP."""
        try:
            return read_mlp(self.energy)
        except NotAnMLP:
            return None

    # -- truths ----------------------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> Tensor:
        """The chains that the gate checks."""
        n, k = self.case.n_chains, self.gate_rows
        middle = max(0, (n - k) // 2)
        picks = [*range(min(k, n)), *range(middle, min(middle + k, n)), *range(max(0, n - k), n)]
        return torch.tensor(sorted(set(picks)), device=self.device)

    @cached_property
    def start(self) -> Tensor:
        """The gate's chains: (rows, dim) float32."""
        return self.x0[self.rows].flatten(1)

    def descended(self, x: Tensor, gradient: Tensor) -> Tensor:
        """One step without noise."""
        moved = x - self.case.drift * gradient
        return moved if self.case.clamp is None else moved.clamp(*self.case.clamp)

    def gradient(self, x: Tensor) -> Tensor:
        """dE/dx of each chain by autograd in the dtype of x: (n, dim)."""
        return gradient_of(self.energy, x.reshape(len(x), *self.case.shape)).flatten(1)

    @cached_property
    def double_energy(self) -> Energy:
        """The energy in float64, as the reference takes it."""
        return Energy(self.energy, self.case.shape, torch.float64)

    @cached_property
    def descent(self) -> Tensor:
        """The gate's chains in float64 after one step without noise: only the energy gradient and the clamp."""
        x = self.start.double()
        return self.descended(x, self.gradient(x))

    @cached_property
    def noisy(self) -> Tensor:
        """The gate's chains in float64 after GATE_STEPS steps with fastebm's noise."""
        return self._reference(self.start.double(), self.rows, SEED)

    @cached_property
    def copies(self) -> Tensor:
        """(LAW_COPIES, n_chains, dim) float64: independent runs of GATE_STEPS steps, from the case's start."""
        x, chains = self.x0.flatten(1).double(), torch.arange(self.case.n_chains, device=self.device)
        return torch.stack([self._reference(x, chains, SEED + 1 + copy) for copy in range(LAW_COPIES)])

    def _reference(self, x: Tensor, chains: Tensor, seed: int) -> Tensor:
        sampler = self.rule(self.case.noise_std)
        at = Chains(x, seed, chains, torch.zeros_like(chains))
        return reference.run(Autograd(self.double_energy), at, sampler, GATE_STEPS).x

    def allowed(self, precision: str) -> float:
        """The error that a contestant may have after one step without noise: twice that of plain PyTorch at the same
        precision, plus rounding."""
        x = self.start
        plain = self.gradient(x) if self.mlp is None else plain_gradient(self.mlp, x, precision)
        scale = largest(x) + largest(self.descent - x)
        return 2 * largest(self.descended(x, plain) - self.descent) + 2 * ULP * scale


def law_case(case: Case) -> Case:
    """The case with the number of chains for which laws are compared."""
    least, most = LAW_CHAINS
    return replace(case, n_chains=min(most, max(least, LAW_NORMALS // case.dim)), steps=GATE_STEPS)


@lru_cache(maxsize=2)
def law_problem(case: Case, device: torch.device, dry: bool) -> Problem:
    """The problem of a ``law_case``, cached for the next contestant."""
    return Problem(case, device, dry)


def law_p_value(x: Tensor, copies: Tensor) -> float:
    """A p-value for x (n, dim), of independent chains, having the law of copies (k, n, dim) of the same chains.

    The smallest of three p-values, times three. x and a copy follow one law given the start, so over the chains
    mean(x - copy) = 0 in every coordinate (noise that chains share fails here), and mean |x - copy|^2 is that of two
    copies (its size), as is mean (sum_j (x - copy)_j)^2 (noise that dims share). Each mean is compared with its own
    standard error over the chains.
    """
    x, dim = x.double(), x.shape[1]
    own = x - copies
    between = torch.stack([a - b for a, b in combinations(copies, 2)])

    def p_of(values: Tensor) -> float:
        """Two-sided, of mean(values) = 0 for each column, corrected for their number."""
        if not bool(values.isfinite().all()):
            return 0.0
        error = values.std(dim=0) / math.sqrt(len(values))
        z = values.mean(dim=0).abs() / error.clamp_min(torch.finfo(torch.float64).tiny)
        return min(1.0, float(torch.special.erfc(z.max() / math.sqrt(2))) * values.shape[1])

    sizes, sums = (
        [(d if f is None else f(d)).square().sum(dim=2).mean(dim=0) for d in (own, between)]
        for f in (None, lambda d: d.sum(dim=2, keepdim=True) / math.sqrt(dim))
    )
    p_values = [p_of(own.mean(dim=0)), p_of((sizes[0] - sizes[1])[:, None]), p_of((sums[0] - sums[1])[:, None])]
    return min(1.0, 3 * min(p_values))


# -- precision -----------------------------------------------------------------------------------------------


# PyTorch's product of two bf16 matrices. Unlike in the kernels, the result is rounded to bf16 too.
MM_BF16 = "mm-bf16"


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16. Without them a product takes many times longer than in float32."""
    return bool(torch.cpu._is_avx512_bf16_supported())


@contextmanager
def matmul(precision: str) -> Iterator[None]:
    """PyTorch's matrix products on CUDA in tf32 if that is the precision, else in float32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def largest(values: Tensor) -> float:
    return float(values.abs().max())


def truncated(values: Tensor, bits: int) -> Tensor:
    return (values.contiguous().view(torch.int32) & -(1 << bits)).view(torch.float32)


def halves(values: Tensor, precision: str, *, in_kernel: bool, on_gpu: bool) -> tuple[Tensor, ...]:
    """An operand as a precision multiplies it: a sum of terms, each exact in float32.

    Weights are rounded on the host. In the kernel, bf16x3 cuts the high half off and rounds the rest, and tensor
    cores drop the low bits of tf32; the interpreter cuts wherever a GPU rounds to bf16, and keeps all of tf32.
    """
    if precision in ("ieee", "float32"):
        return (values,)
    if precision == "tf32":
        return (truncated(values, 13) if on_gpu else values,)
    cut = in_kernel and (not on_gpu or precision == "bf16x3")
    rounded = truncated(values, 16) if cut else values.bfloat16().float()
    if precision == "bf16":
        return (rounded,)
    rest = values - rounded
    return rounded, truncated(rest, 16) if in_kernel and not on_gpu else rest.bfloat16().float()


def plain_gradient(mlp: MLP, x: Tensor, precision: str, *, on_gpu: bool | None = None) -> Tensor:
    """dE/dx by plain PyTorch with operands rounded as documented for a precision; sums in float32.

    on_gpu: round as tensor cores do, or as Triton's interpreter does. None: as the kernels do on this machine.
    """
    on_gpu = not interpreted() if on_gpu is None else on_gpu

    def product(a: Tensor, w: Tensor) -> Tensor:
        if precision == MM_BF16:
            return (a.bfloat16() @ w.bfloat16()).float()
        a_terms = halves(a, precision, in_kernel=True, on_gpu=on_gpu)
        w_terms = halves(w, precision, in_kernel=False, on_gpu=on_gpu)
        terms = [a_terms[i] @ w_terms[j] for i in range(len(a_terms)) for j in range(len(w_terms)) if i + j < 2]
        return torch.stack(terms).sum(dim=0)

    h, zs = x, []
    for weight, bias, activation in zip(mlp.weights[:-1], mlp.biases[:-1], mlp.activations, strict=True):
        z = product(h, weight.t())
        zs.append(z if bias is None else z + bias)
        h = activation.forward(zs[-1], torch.empty_like(zs[-1]))
    g = mlp.weights[-1].expand_as(h)
    for weight, z, activation in zip(reversed(mlp.weights[:-1]), reversed(zs), reversed(mlp.activations), strict=True):
        g = product(activation.backward(g, z, torch.empty_like(z)), weight)
    return g
