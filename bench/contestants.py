"""The ways to run a case: what people write in PyTorch, the peers, and fastebm. One definition of each.

A contestant is prepared for (problem, steps, noise_std) and then run any number of times: every run moves p.x0 by the
same update, with fresh noise, and returns the states, (n_chains, *shape). Each draws noise in its own fastest way.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from fastebm.bench.problem import (
    MM_BF16,
    SEED,
    Banana,
    Gaussian,
    Missing,
    Mixture,
    Problem,
    cpu_multiplies_bf16,
    interpreted,
)
from torch import Tensor, nn

from fastebm import GaussianEnergy, SumEnergy, langevin_sample
from fastebm.backends import Chains
from fastebm.backends.choose import choose
from fastebm.targets.autograd import Energy
from fastebm.targets.mlp import MLP, read_mlp

Run = Callable[[], Tensor]
Prepare = Callable[[Problem, int, float], Run]

FUSED_PRECISIONS = ("bf16x3", "tf32", "bf16")


@dataclass(frozen=True)
class Contestant:
    name: str
    precision: str  # of the matrix products
    prepare: Prepare

    @property
    def ours(self) -> bool:
        return is_ours(self.name)


def is_ours(name: str) -> bool:
    return name.startswith("fastebm")


# -- what people write ---------------------------------------------------------------------------------------


def eager(p: Problem, steps: int, noise_std: float) -> Run:
    """What every tutorial has: autograd of the summed energy, torch.randn_like, a Python loop."""
    drift, clamp = p.case.drift, p.case.clamp

    def run() -> Tensor:
        x = p.x0
        for _ in range(steps):
            x = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(p.energy(x).sum(), x)
            x = x.detach().sub(grad, alpha=drift).add_(torch.randn_like(grad), alpha=noise_std)
            if clamp is not None:
                x.clamp_(*clamp)
        return x

    return run


def written_out(mlp: MLP, x: Tensor) -> Tensor:
    """dE/dx of an MLP, (n, dim): backpropagation in plain operations, no graph."""
    h, zs = x, []
    for weight, bias, activation in zip(mlp.weights[:-1], mlp.biases[:-1], mlp.activations, strict=True):
        zs.append(nn.functional.linear(h, weight, bias))
        h = activation.forward(zs[-1], torch.empty_like(zs[-1]))
    g = mlp.weights[-1].expand_as(h)
    for weight, z, activation in zip(reversed(mlp.weights[:-1]), reversed(zs), reversed(mlp.activations), strict=True):
        g = activation.backward(g, z, torch.empty_like(z)) @ weight
    return g


def closed_form(p: Problem, steps: int, noise_std: float) -> Run:
    """The eager loop with the gradient written out: no graph, no autograd."""
    if p.mlp is None:
        raise Missing("the gradient is written out for MLP energies only")
    mlp, drift, clamp = p.mlp, p.case.drift, p.case.clamp

    def run() -> Tensor:
        x = p.x0
        with torch.no_grad():
            for _ in range(steps):
                x = x.sub(written_out(mlp, x), alpha=drift).add_(torch.randn_like(x), alpha=noise_std)
                if clamp is not None:
                    x.clamp_(*clamp)
        return x

    return run


def multiplied_in_bf16(mlp: MLP) -> Callable[[Tensor], Tensor]:
    """The energy of an MLP, (n, dim) -> (n, 1), with products of two bf16 matrices, the fastest that PyTorch has,
    in the forward pass and, by autograd, in the backward pass."""
    weights = [weight.bfloat16() for weight in mlp.weights]

    def energy(x: Tensor) -> Tensor:
        for i, (weight, bias) in enumerate(zip(weights, mlp.biases, strict=True)):
            x = nn.functional.linear(x.bfloat16(), weight).float()
            x = x if bias is None else x + bias
            if i < len(mlp.activations):
                x = _FUNCTIONS[mlp.activations[i].name](x)
        return x

    return energy


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": nn.functional.silu}  # of the cases' energies


@cache
def compiled_step(
    energy: nn.Module, precision: str, drift: float, clamp: tuple[float, float] | None, backend: str, mode: str | None
) -> Callable[[Tensor, Tensor], Tensor]:
    energy_of = multiplied_in_bf16(read_mlp(energy)) if precision == MM_BF16 else energy

    def step(x: Tensor, noise_std: Tensor) -> Tensor:
        grad = torch.func.grad(lambda x: energy_of(x).sum())(x)
        x = x - drift * grad + noise_std * torch.randn_like(x)
        return x if clamp is None else x.clamp(*clamp)

    # the steps of all energies and precisions share one code object, of which PyTorch compiles eight versions at most
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(step, backend=backend, fullgraph=True, mode=mode)  # type: ignore[return-value]


def compiled_at(precision: str, mode: str | None = None) -> Prepare:
    """The step under torch.compile (one graph: gradient, noise, update, clamp), in a Python loop.

    The loop is not unrolled into the graph, since compilation time would grow with the number of steps.
    precision: MM_BF16, or any other by ``matmul``. mode: of torch.compile.
    """

    def prepared(p: Problem, steps: int, noise_std: float) -> Run:
        if precision == MM_BF16 and p.mlp is None:
            raise Missing("products in bf16 are written out for MLP energies only")
        if mode is not None and p.device.type != "cuda":
            raise Missing("autotuning chooses among a GPU's kernels")
        # a dry run does not compile for real
        backend, options = ("eager", None) if p.dry else ("inductor", mode)
        step = compiled_step(p.energy, precision, p.case.drift, p.case.clamp, backend, options)
        std = torch.tensor(noise_std, device=p.device)
        # One compilation for every number of chains: the products are cuBLAS's in any case, the rest is elementwise.
        torch._dynamo.maybe_mark_dynamic(p.x0, 0)

        def run() -> Tensor:
            x = p.x0
            with torch.no_grad():
                for _ in range(steps):
                    x = step(x, std)
            return x

        return run

    return prepared


def graphed(prepare: Prepare) -> Prepare:
    """A whole loop of another contestant, captured in one CUDA graph."""

    def prepared(p: Problem, steps: int, noise_std: float) -> Run:
        if p.device.type != "cuda":
            raise Missing("CUDA graphs need a CUDA device")
        loop = prepare(p, steps, noise_std)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            prepare(p, 2, noise_std)()  # libraries set themselves up outside the capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads of a peer may run meanwhile
            x = loop()

        def run() -> Tensor:
            graph.replay()
            return x

        return run

    return prepared


# -- peers ---------------------------------------------------------------------------------------------------


def torchebm(p: Problem, steps: int, noise_std: float) -> Run:
    """torchebm's LangevinDynamics: x' = x - eta dE/dx + sqrt(2 eta) noise_scale xi, then its clamp."""
    try:
        from torchebm.core import BaseModel
        from torchebm.samplers import LangevinDynamics
    except ImportError:
        raise Missing("torchebm is not installed") from None
    energy = p.energy

    class Model(BaseModel):  # type: ignore[misc]
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return energy(x).squeeze(1)  # type: ignore[no-any-return]

    sampler = LangevinDynamics(
        Model(device=p.device),
        step_size=p.case.drift,
        noise_scale=max(noise_std, 1e-20) / (2 * p.case.drift) ** 0.5,  # 0 is not allowed
        clamp=p.case.clamp,
        device=p.device,
    )
    return lambda: sampler.sample(x=p.x0, n_steps=steps)  # type: ignore[no-any-return]


def ebmkit(p: Problem, steps: int, noise_std: float) -> Run:
    """ebmkit's LangevinDynamics: x' = x - step_size dE/dx + noise_scale xi, then its clamp."""
    try:
        from ebm import LangevinDynamics
    except ImportError:
        raise Missing("ebmkit is not installed") from None
    energy = p.energy
    sampler = LangevinDynamics(p.case.drift, steps, noise_scale=noise_std, clamp=p.case.clamp)
    return lambda: sampler.sample(lambda x: energy(x).squeeze(1), p.x0)  # type: ignore[no-any-return]


def jax_energy(energy: nn.Module, precision: str) -> Callable[[Any], Any]:
    """The energy of a case in JAX, with the same weights: (n, *shape) -> the sum of n energies."""
    import jax

    jnp, lax = jax.numpy, jax.lax

    def array(t: Tensor | None) -> Any:
        return 0.0 if t is None else jnp.asarray(t.detach().cpu().numpy())

    if isinstance(energy, Gaussian):
        matrix = array(energy.precision)
        return lambda x: 0.5 * (jnp.dot(x, matrix, precision=precision) * x).sum()
    if isinstance(energy, Mixture):
        means = array(energy.means)
        return lambda x: -jax.nn.logsumexp(-0.5 * ((x[:, None] - means) ** 2).sum(2), axis=1).sum()
    if isinstance(energy, Banana):
        curvature, std = energy.curvature, energy.std
        return lambda x: (x[:, 0] ** 2 + ((x[:, 1] - curvature * (x[:, 0] ** 2 - 1)) / std) ** 2).sum() / 2
    if isinstance(energy, GaussianEnergy):
        mean, std = array(energy.mean), array(energy.std)
        return lambda x: 0.5 * (((x - mean) / std) ** 2).sum()
    if isinstance(energy, SumEnergy):
        terms = [(float(w), jax_energy(e, precision)) for w, e in zip(energy.weights, energy.energies, strict=True)]
        return lambda x: sum(w * term(x) for w, term in terms)

    def linear(layer: nn.Linear) -> Callable[[Any], Any]:
        weight, bias = array(layer.weight.t()), array(layer.bias)
        return lambda x: jnp.dot(x, weight, precision=precision) + bias

    def conv(layer: nn.Conv2d) -> Callable[[Any], Any]:
        weight, bias = array(layer.weight), array(layer.bias).reshape(-1, 1, 1)
        stride, padding = layer.stride, [(n, n) for n in layer.padding]
        return lambda x: lax.conv_general_dilated(x, weight, stride, padding, precision=precision) + bias

    def read(layer: nn.Module) -> Callable[[Any], Any]:
        if isinstance(layer, nn.Linear):
            return linear(layer)
        if isinstance(layer, nn.Conv2d):
            return conv(layer)
        return {nn.SiLU: jax.nn.silu, nn.Flatten: lambda x: x.reshape(len(x), -1)}[type(layer)]

    layers = [read(layer) for layer in energy]  # type: ignore[attr-defined]

    def total(x: Any) -> Any:
        for layer in layers:
            x = layer(x)
        return x.sum()

    return total


JaxStep = Callable[[Any, Any, Callable[[Any], Any], Any, Any], Any]  # x, key, gradient, drift, noise_std -> x


@cache
def _jax_loop(make_step: Callable[[], JaxStep], energy: nn.Module, clamp: Any, steps: int, precision: str) -> Any:
    """(x, key, drift, noise_std) -> x: jit of lax.scan over a step and the clamp, on the whole batch."""
    import jax

    gradient, step = jax.grad(jax_energy(energy, precision)), make_step()

    def loop(x: Any, key: Any, drift: Any, noise_std: Any) -> Any:
        def clamped(x: Any, key: Any) -> Any:
            x = step(x, key, gradient, drift, noise_std)
            return x if clamp is None else jax.numpy.clip(x, *clamp), None

        return jax.lax.scan(clamped, x, jax.random.split(key, steps))[0]

    return jax.jit(loop)


def in_jax(make_step: Callable[[], JaxStep]) -> Prepare:
    """A step in JAX as a contestant. Tensors pass both ways without a copy."""

    def prepared(p: Problem, steps: int, noise_std: float) -> Run:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        try:
            import jax
        except ImportError:
            raise Missing("jax is not installed") from None
        if p.device.type == "cuda" and jax.default_backend() != "gpu":
            raise Missing("this jax has no CUDA backend")
        tf32 = p.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        precision = "tensorfloat32" if tf32 else "highest"
        loop = _jax_loop(make_step, p.energy, p.case.clamp, steps, precision)
        # JAX's fastest noise: on a GPU the generator of XLA
        keys = (
            jax.random.key(SEED + call, impl="rbg" if p.device.type == "cuda" else None) for call in itertools.count()
        )

        def run() -> Tensor:
            x = loop(jax.dlpack.from_dlpack(p.x0), next(keys), p.case.drift, noise_std)
            return torch.from_dlpack(jax.block_until_ready(x))

        return run

    return prepared


def jax_step() -> JaxStep:
    import jax

    return lambda x, key, gradient, drift, noise_std: (
        x - drift * gradient(x) + noise_std * jax.random.normal(key, x.shape)
    )


def blackjax_step() -> JaxStep:
    """BlackJAX' sgld: x' = x + eta grad log p + sqrt(2 eta T) xi. The batch is one position. It has no clamp itself."""
    try:
        import blackjax
    except ImportError:
        raise Missing("blackjax is not installed") from None

    def step(x: Any, key: Any, gradient: Callable[[Any], Any], drift: Any, noise_std: Any) -> Any:
        sgld = blackjax.sgld(lambda x, minibatch: -gradient(x))
        return sgld.step(key, x, None, drift, noise_std**2 / (2 * drift))

    return step


# -- fastebm -------------------------------------------------------------------------------------------------


def fastebm_at(backend: str, precision: str | None = None) -> Prepare:
    """langevin_sample as users call it, timed with its checks and its copy. backend: "auto" is for a CPU."""

    def prepared(p: Problem, steps: int, noise_std: float) -> Run:
        if backend == "triton":
            if interpreted() and not p.dry:
                raise Missing("Triton's interpreter is on (TRITON_INTERPRET=1): its times mean nothing")
            try:
                why_not = choose(p.energy, p.device, torch.float32, backend, precision).why_not_fused
            except ValueError as error:
                why_not = str(error)
            if why_not is not None:
                raise Missing(why_not)
        if backend == "auto" and p.device.type != "cpu":
            raise Missing("on a GPU the default call is that of fastebm-triton, bf16x3")
        if backend == "auto" and precision == "bf16" and p.mlp is None:
            raise Missing("products in bf16 are for MLP energies")
        if backend == "auto" and precision == "bf16" and not cpu_multiplies_bf16():
            raise Missing("this CPU has no bf16 products")
        sampler = p.rule(noise_std)
        options: dict[str, Any] = {"backend": backend, "precision": precision, "clamp": sampler.clamp, "seed": SEED}
        options |= {"step_size": sampler.step_size, "noise_scale": sampler.noise_scale}
        first_steps = itertools.count(0, steps)
        return lambda: langevin_sample(  # type: ignore[return-value]
            p.energy, init=p.x0, steps=steps, first_step=next(first_steps), **options
        )

    return prepared


def fastebm_graph(precision: str) -> Prepare:
    """langevin_sample captured in a CUDA graph, so that the cost of a call on the host is paid once."""

    def prepared(p: Problem, steps: int, noise_std: float) -> Run:
        if p.device.type != "cuda":
            raise Missing("CUDA graphs need a CUDA device")
        fastebm_at("triton", precision)(p, steps, noise_std)  # raises Missing where there is no kernel
        sampler = p.rule(noise_std)
        seed = torch.tensor([SEED], device=p.device)
        first_step = torch.zeros(1, dtype=torch.int64, device=p.device)
        options: dict[str, Any] = {"backend": "triton", "precision": precision, "on_nonfinite": "ignore"}
        options |= {"step_size": sampler.step_size, "noise_scale": sampler.noise_scale, "clamp": sampler.clamp}

        def call() -> Tensor:
            x = langevin_sample(p.energy, init=p.x0, steps=steps, seed=seed, first_step=first_step, **options)
            first_step.add_(steps)
            return x  # type: ignore[return-value]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()  # compiles, outside the capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads of a peer may run meanwhile
            x = call()
        first_step.zero_()

        def run() -> Tensor:
            graph.replay()
            return x

        return run

    return prepared


def fastebm_update(p: Problem, steps: int, noise_std: float) -> Run:
    """The path of fastebm for an energy without a fused kernel: autograd, then noise and update in one launch."""
    if p.device.type != "cuda" and not (interpreted() and p.dry):
        raise Missing("the update kernel needs a CUDA device")
    from fastebm.backends import fused  # only here: it imports triton

    sampler = p.rule(noise_std)
    energy = Energy(p.energy, p.case.shape, torch.float32)
    numbers = torch.arange(p.case.n_chains, device=p.device)
    first_steps = itertools.count(0, steps)

    def run() -> Tensor:
        ages = torch.full_like(numbers, next(first_steps))
        chains = Chains(p.x0.flatten(1).clone(), SEED, numbers, ages)
        return fused.run_module(energy, chains, sampler, steps).x.reshape(p.x0.shape)

    return run


# -- all of them, most important first, since a benchmark may run out of time before the end -----------------

CONTESTANTS = (
    Contestant("eager", "float32", eager),
    Contestant("fastebm", "float32", fastebm_at("auto")),  # the default call
    Contestant("fastebm", MM_BF16, fastebm_at("auto", "bf16")),
    *(Contestant("fastebm-triton", precision, fastebm_at("triton", precision)) for precision in FUSED_PRECISIONS),
    *(Contestant("fastebm-graph", precision, fastebm_graph(precision)) for precision in ("bf16x3", "bf16")),
    *(Contestant("compile+graph", q, graphed(compiled_at(q))) for q in ("float32", "tf32", MM_BF16)),
    Contestant("closed-form+graph", "float32", graphed(closed_form)),
    Contestant("jax", "float32", in_jax(jax_step)),
    Contestant("jax", "tf32", in_jax(jax_step)),
    Contestant("torchebm", "float32", torchebm),
    Contestant("ebmkit", "float32", ebmkit),
    Contestant("blackjax", "float32", in_jax(blackjax_step)),
    Contestant("graph", "float32", graphed(eager)),
    Contestant("compile", "float32", compiled_at("float32")),
    Contestant("closed-form", "float32", closed_form),
    Contestant("fastebm-update", "float32", fastebm_update),
    Contestant("fastebm-reference", "float32", fastebm_at("reference")),
    Contestant("eager", "tf32", eager),
    Contestant("autotuned+graph", "float32", graphed(compiled_at("float32", "max-autotune-no-cudagraphs"))),
)


def taking_part(device: torch.device) -> tuple[Contestant, ...]:
    """All on a GPU. On a CPU one per name, since the precisions of tensor cores are the same there."""
    if device.type == "cuda":
        return CONTESTANTS
    firsts = {c.name: c for c in reversed(CONTESTANTS)}
    return tuple(c for c in CONTESTANTS if c is firsts[c.name] or c.precision == MM_BF16)
