"""Preparation for the fused kernel: weights have the bits that plain PyTorch gives; a call dispatches little and
synchronises once; launches share scratch; unaligned tensors do not recompile."""

import pytest
import runs
import torch
from torch import nn
from torch.nn.functional import pad
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from fastebm.kernels.triton import weights
from fastebm.kernels.triton.launch import Launch, block

from fastebm import (
    ChainPool,
    ClassifierEnergy,
    GaussianEnergy,
    Langevin,
    MLPEnergy,
    NonFiniteError,
    SumEnergy,
    langevin_sample,
)
from fastebm.backends import Chains, fused
from fastebm.backends.choose import interpreted
from fastebm.targets.description import describe

# -- the bits -----------------------------------------------------------------------------------------------------


def in_lanes(v):
    """The last axis in the order of kernels/triton/tiles.py, to_lanes."""
    return v.reshape(*v.shape[:-1], -1, 4, 2, 2).transpose(-3, -2).reshape(v.shape)


def halves_of(weight, precision):
    if precision not in ("bf16", "bf16x3"):
        return (weight,)
    hi = weight.bfloat16()
    return (hi,) if precision == "bf16" else (hi, (weight - hi).bfloat16())


def plain_layers(mlp, precision, block_dim):
    """For each layer, the padded weight in its halves, and the bias."""
    padded_in = -(-mlp.dim // block_dim) * block_dim
    for i, (weight, bias) in enumerate(zip(mlp.weights, mlp.biases, strict=True)):
        is_head = i == len(mlp.activations)
        if precision == "bf16" and not is_head and mlp.activations[i].name == "silu":
            weight, bias = weight * 0.5, None if bias is None else bias * 0.5
        n_out, n_in = weight.shape
        bias = weight.new_zeros(n_out) if bias is None else bias
        weight = pad(weight, (0, padded_in - n_in))
        if is_head and mlp.head != "logsumexp":
            yield (weight,), bias
            return
        padded_in = block(n_out)
        weight = pad(weight, (0, 0, 0, padded_in - n_out))
        bias = pad(bias, (0, padded_in - n_out), value=-torch.inf if is_head else 0.0)
        yield halves_of(in_lanes(weight) if i == 0 else weight, precision), bias


def plain(description, precision, block_dim):
    """All parts in plain PyTorch: layers, -w_k, the constant, c, m and b, and the numbers that bound a gradient."""
    d = description.to(description.mlps[0].weights[0].device, torch.float32)
    padded = -(-d.dim // block_dim) * block_dim
    layers = [layer for mlp in d.scaled_heads() for layer in plain_layers(mlp, precision, block_dim)]
    rows = [in_lanes(pad(row, (0, padded - d.dim))) for row in (d.curvature, d.mean, d.linear) if row is not None]
    zeros = torch.zeros(d.dim, device=d.scales.device)
    c, m, b = (zeros if v is None else v for v in (d.curvature, d.mean, d.linear))
    reach = [c.abs().amax(), (b - c * m).abs().amax(), *(mlp.weights[0].abs().amax() for mlp in d.mlps)]
    return layers, [-d.scales, d.constant.reshape(1), *rows], torch.stack(reach)


def mlp(dim=5, widths=(7, 9), **options):
    return MLPEnergy(dim, widths, **options)


def classifier(bias=True):
    return ClassifierEnergy(nn.Sequential(nn.Linear(5, 7, bias), nn.SiLU(), nn.Linear(7, 10, bias)))


def without_bias():
    energy = mlp(63, (33, 3))
    for layer in energy:
        if isinstance(layer, nn.Linear):
            layer.bias = None
    return energy


def strided():
    """Parameters that are views of a larger tensor, transposed and unaligned; one of them shared."""
    energy, store = mlp(6, (6, 6)), torch.randn(500)
    with torch.no_grad():
        energy[0].weight.set_(store.untyped_storage(), 3, (6, 6), (1, 13))
        energy[2].weight = energy[0].weight
        energy[2].bias.set_(store.untyped_storage(), 7, (6,), (5,))
    return energy


def everything():
    terms = (classifier(), mlp(), GaussianEnergy(torch.rand(5), torch.rand(5) + 0.5), nn.Linear(5, 1), mlp(5, (17,)))
    return SumEnergy(terms, (0.3, -1.7, 0.9, 2.0, 1.1))


def special():
    """Numbers at the limits of bf16, ties, and NaN."""
    energy = mlp(16, (16,))
    values = [0.0, -0.0, 1e-45, -1e-40, 3.3895e38, -3.4e38, torch.inf, -torch.inf, torch.nan, 1.00390625, 1.01171875]
    with torch.no_grad():
        energy[0].weight.view(-1)[: len(values)] = torch.tensor(values)
    return energy


ENERGIES = {
    "plain": mlp,
    "dim 1": lambda: mlp(1, (3,)),
    "odd": lambda: mlp(63, (1, 63, 3), activation="tanh"),
    "no bias": without_bias,
    "float64": lambda: everything().double(),
    "half": lambda: mlp().half(),
    "strided": strided,
    "spectral norm": lambda: mlp(spectral_norm=True),
    "weight norm": lambda: nn.Sequential(weight_norm(nn.Linear(5, 7)), nn.SiLU(), nn.Linear(7, 1)),
    "classifier": classifier,
    "classifier without bias": lambda: classifier(False),
    "sum": everything,
    "gaussian": lambda: SumEnergy([mlp(), GaussianEnergy(0.3, 2.0)]),
    "linear": lambda: SumEnergy([mlp(), nn.Linear(5, 1)]),
    "special": special,
}  # fmt: skip


@pytest.mark.parametrize("precision", ["bf16x3", "bf16", "ieee"])
@pytest.mark.parametrize("name", ENERGIES)
def test_the_bits_of_plain_pytorch(name, precision, device):
    torch.manual_seed(0)
    energy = ENERGIES[name]().to(device).eval()
    if name == "strided" and device != "cpu":
        pytest.skip(".to() makes it contiguous")
    for regime, labels in (("resident", False), ("streaming", isinstance(energy, ClassifierEnergy))):
        with torch.no_grad():
            bare = describe(energy, labels=labels, bare=True)
        block_dim = block(bare.dim) if regime == "resident" else 16
        launch = Launch(regime, 64, block_dim, 4, 1)
        for seed in (2**64 - 5, torch.tensor([7, 2**62 + 3], device=device)[1:]):
            prepared, places = fused.prepare(bare, seed, precision, launch, torch.device(device))
            layers, rows, reach = plain(describe(energy, labels=labels), precision, block_dim)
            words = prepared.cpu()
            signed = int(words[weights.SEED.value :][:2].view(torch.int64))
            assert signed % 2**64 == int(seed)
            assert words[weights.REPORT.value] == 0
            for (halves, bias), first, low, at in zip(
                layers, places["WEIGHTS"], places["LOWS"], places["BIASES"], strict=True
            ):
                assert (low < 0) == (halves[0].dtype == torch.float32)
                for half, start in zip(halves, (first, low), strict=False):
                    same(words, start, half)
                same(words, at, bias)
            for row, at in zip(rows, [word for word in places["TERMS"] if word >= 0], strict=True):
                same(words, at, row)
            if regime == "streaming":
                same(words, weights.BOUNDS.value, reach)


def same(words, start, expected):
    """Assert that expected lies at word start, bit for bit except for NaN payloads."""
    expected = expected.cpu().contiguous().flatten()
    found = words[start:].view(expected.dtype)[: expected.numel()]
    assert torch.equal(found.isnan(), expected.isnan())
    kind = torch.int16 if expected.dtype == torch.bfloat16 else torch.int32
    assert torch.equal(found.nan_to_num(9.0).view(kind), expected.nan_to_num(9.0).view(kind))


def test_weights_are_never_kept(device):
    """Writes through .data do not change a tensor's version."""
    torch.manual_seed(0)
    energy, x = mlp().to(device), torch.randn(9, 5, device=device)
    options = {"init": x, "steps": 2, "step_size": 0.1, "seed": 1, "backend": "triton"}
    before = langevin_sample(energy, **options)
    energy[0].weight.data.mul_(2.0)
    after = langevin_sample(energy, **options)
    assert not torch.equal(before, after)
    fresh = mlp().to(device)
    fresh.load_state_dict(energy.state_dict())
    assert torch.equal(langevin_sample(fresh, **options), after)


# -- what a call costs the host -------------------------------------------------------------------------------------


class Recorder:
    """Replaces a kernel and records its launches."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((grid, args, kwargs))


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names, self.waits = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, result = str(function), function(*args, **(kwargs or {}))
        self.names.append(name)
        # on a GPU these synchronise: a value for the host, or a size that only the device knows
        self.waits += any(part in name for part in ("_local_scalar_dense", "nonzero", "equal.default", "masked_select"))
        return result


@pytest.mark.parametrize("return_info", [False, True])
@pytest.mark.parametrize("precision", ["bf16x3", "bf16"])
@pytest.mark.parametrize(("dim", "widths"), [(64, [128, 128]), (784, [256, 128])])
@pytest.mark.parametrize("plain_sequential", [False, True])
@pytest.mark.skipif(not interpreted(), reason="counts without the device's own operations")
def test_a_call_dispatches_little_and_waits_once(dim, widths, precision, return_info, plain_sequential, monkeypatch):
    recorders = []
    for module, name in (
        (fused.weights, "prepare"),
        (fused.resident, "langevin_resident"),
        (fused.streaming, "langevin_streaming"),
    ):
        recorders.append(Recorder(getattr(module, name)))
        monkeypatch.setattr(module, name, recorders[-1])
    energy = MLPEnergy(dim, widths)
    energy = nn.Sequential(*energy) if plain_sequential else energy
    options = {"steps": 60, "step_size": 0.1, "noise_scale": 1.0, "clamp": (0.0, 1.0), "seed": 3}
    with Operations() as operations:
        langevin_sample(
            energy, init=torch.rand(100, dim), backend="triton", precision=precision, return_info=return_info, **options
        )
    operations.names.remove("aten.rand.default")
    assert len(operations.names) <= 12, operations.names
    assert operations.waits <= 1
    assert sum(len(recorder.launches) for recorder in recorders) == 2


@pytest.mark.parametrize("on_nonfinite", ["raise", "reinit", "ignore"])
@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_a_start_that_is_not_finite(backend, on_nonfinite, steps, device):
    """Found by one test of all chains after the launch, with the message of a test before it."""
    torch.manual_seed(0)
    x = torch.randn(70, 5, device=device)
    x[3, 1], x[69, 0] = torch.nan, -torch.inf
    before, out = x.clone(), torch.full_like(x, 7.0)
    for start, energy in ((x, mlp()), (x[:, None, :].expand(70, 1, 5), nn.Sequential(nn.Flatten(), *mlp()))):
        with pytest.raises(ValueError, match=r"^init must be finite, got NaN or inf in 2 of 70 chains \(first: 3\)$"):
            langevin_sample(
                energy.to(device), init=start, steps=steps, step_size=0.1, seed=1, backend=backend,
                on_nonfinite=on_nonfinite, out=out if start.ndim == 2 else None,
            )  # fmt: skip
    assert torch.equal(x.nan_to_num(9.0), before.nan_to_num(9.0))
    assert bool((out == 7.0).all())


@pytest.mark.parametrize("regime", ["resident", "streaming"])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_the_report_is_what_chains_say(regime, device):
    """The report is set if any chain or any energy is not finite, and only then."""
    torch.manual_seed(0)
    energy = mlp(20, (8,)).to(device)
    launch = Launch(regime, 64, 32 if regime == "resident" else 16, 4, 1)

    def report(x, noise_scale, energy=energy, steps=1):
        numbers = torch.arange(len(x), device=device)
        chains = Chains(x.clone(), 1, numbers, numbers * 0)
        rule = Langevin(1.0, noise_scale)
        done = runs.fused_mlp(describe(energy), chains, rule, steps, precision="ieee", launch=launch)
        bad = (done.first_bad >= 0) | ~done.energy.isfinite()
        assert bool(done.report) == bool(bad.any())
        return bool(done.report)

    x = torch.randn(130, 20, device=device)
    noise = torch.full((130, 1), 0.1)
    assert not report(x, noise)
    noise[129] = 3e38
    assert report(x, noise)
    energy[2].bias.data.fill_(torch.inf)
    assert report(x, 0.1, steps=0)


def test_chains_that_explode_are_raised(device):
    torch.manual_seed(0)
    x = torch.randn(70, 5, device=device)
    noise = torch.full((70, 1), 0.1)
    noise[5] = 3e38
    with pytest.raises(NonFiniteError, match="1 of 70 chains are not finite"):
        langevin_sample(mlp().to(device), init=x, steps=2, step_size=1.0, noise_scale=noise, seed=1, backend="triton")


# -- launches that share scratch --------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize(
    ("regime", "precision"),
    [
        pytest.param("streaming", "ieee", marks=pytest.mark.slow),
        pytest.param("streaming", "bf16x3", marks=pytest.mark.slow),
        ("resident", "bf16x3"),
    ],
)
def test_slices_change_no_bits_and_bound_the_scratch(regime, precision, labels, device, monkeypatch):
    torch.manual_seed(0)
    n, dim, steps = 300, 20, 2
    energy = everything_of(dim).to(device)
    in_memory = regime == "resident" or precision == "bf16x3"
    launch = Launch(regime, 64, 32 if regime == "resident" else 16, 4, 1, in_memory=in_memory)
    noise = torch.rand(n, 1)
    noise[[70, 299]] = 3e38  # of the second slice and the last
    step_size = torch.rand(n, 1) * 0.1 + 0.1
    step_size[[70, 299]] = 1.0
    rule = Langevin(step_size, noise, grad_norm_clip=2.0)
    x, frozen = torch.randn(n, dim, device=device), torch.rand(n, dim, device=device) < 0.2
    numbers = torch.arange(n, device=device) * 3 + 2**33

    def advance(at_once):
        monkeypatch.setattr(fused, "CHAINS_AT_ONCE", at_once)
        chains = Chains(x.clone(), 2**63 + 9, numbers, numbers % 7, numbers % 10 if labels else None, frozen)
        sizes, empty = [], torch.empty

        def counted(*size, **options):
            sizes.append(size[0])
            return empty(*size, **options)

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", counted)
            done = runs.fused_mlp(
                describe(energy, labels=labels), chains, rule, steps, precision=precision, launch=launch, thin=1,
                telemetry=True,
            )  # fmt: skip
        if regime == "streaming":
            assert max(size for size in sizes if size != n) <= max(64, at_once)
        return done

    with pytest.warns(RuntimeWarning, match="encountered in") if interpreted() else torch.no_grad():
        whole, parts = advance(2**17), advance(128)
    for a, b in zip((*whole[:4], *whole.telemetry.values()), (*parts[:4], *parts.telemetry.values()), strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    assert whole.first_bad[[70, 299]].tolist() == [0, 0]
    assert bool(whole.report)
    assert bool(parts.report)


def everything_of(dim):
    classes = ClassifierEnergy(nn.Sequential(nn.Linear(dim, 7), nn.SiLU(), nn.Linear(7, 10)))
    return SumEnergy([classes, mlp(dim, (9,)), GaussianEnergy(0.2, 1.5)], (0.5, 1.0, 0.3))


def test_scratch_of_ten_million_chains():
    """A launch's scratch is at most 128 MiB for a network 256 wide, and holds whole tiles of any shipped size."""
    assert fused.CHAINS_AT_ONCE % 128 == 0
    assert fused.CHAINS_AT_ONCE * 2 * 256 * 2 <= 2**27
    assert fused.CHAINS_AT_ONCE >= 4 * 160 * 128  # some rounds of tiles on the largest GPUs


# -- alignment --------------------------------------------------------------------------------------------------------


class Watched:
    """Wraps a kernel and records what triton would specialise each launch for."""

    def __init__(self, kernel):
        self.kernel, self.seen = kernel, set()

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.seen.add(self.specialisation(args))
            return self.kernel[grid](*args, **kwargs)

        return launch

    def specialisation(self, args):
        """Types, and which pointers are known to be aligned to 16 bytes."""
        options = self.kernel.kwargs if interpreted() else vars(self.kernel)
        loose = [n for key in ("do_not_specialize", "do_not_specialize_on_alignment") for n in options.get(key) or ()]
        assert not any(isinstance(value, int) and name not in loose for name, value in self.named(args))
        return tuple(
            (name, str(value.dtype), name in loose or value.data_ptr() % 16 == 0)
            if isinstance(value, torch.Tensor)
            else (name, type(value).__name__)
            for name, value in self.named(args)
        )

    def named(self, args):
        """Without strides of frozen coordinates and coefficients, which take few values whatever the address."""
        pairs = zip(self.kernel.arg_names, args, strict=False)
        return [(name, value) for name, value in pairs if not name.startswith("stride_")]


@pytest.fixture
def watched(monkeypatch):
    kernels = {}
    for module, name in (
        (fused.weights, "prepare"),
        (fused.resident, "langevin_resident"),
        (fused.streaming, "langevin_streaming"),
        (fused.update, "langevin_update"),
    ):
        kernels[name] = Watched(getattr(module, name))
        monkeypatch.setattr(module, name, kernels[name])
    return kernels


@pytest.mark.parametrize("path", ["resident", "streaming", "autograd"])
def test_unaligned_chunks_do_not_recompile(path, watched, device):
    torch.manual_seed(0)
    dim = 130 if path == "streaming" else 3
    classes = nn.Sequential(nn.Linear(dim, 7), nn.SiLU(), nn.Linear(7, 4))
    energy = ClassifierEnergy(nn.Sequential(classes, nn.Softplus()) if path == "autograd" else classes).to(device)
    rule = Langevin(torch.rand(23, 1) * 0.1 + 0.1, 0.1)
    pool = ChainPool(23, dim, labels=torch.arange(23) % 4, device=device, clamp=(torch.zeros(dim + 1)[1:], 1.0))
    for chunk_size in (23, 5, 7):
        pool.advance(energy, rule, 1, chunk_size=chunk_size, backend="triton")
    ran = "langevin_update" if path == "autograd" else f"langevin_{path}"
    assert watched[ran].seen
    for kernel in watched.values():
        assert len(kernel.seen) <= 1


@pytest.mark.parametrize("path", ["resident", "autograd"])
def test_unaligned_tensors_of_a_call_do_not_recompile(path, watched, device):
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(3, 7), nn.SiLU(), nn.Linear(7, 4)).to(device)
    energy = ClassifierEnergy(nn.Sequential(inner, nn.Softplus()) if path == "autograd" else inner)
    bounds, labels = torch.rand(2, 9, device=device), torch.arange(40, device=device) % 4
    x, frozen, step = torch.rand(41, 3, device=device), torch.rand(41, 3, device=device) < 0.2, labels + 2
    noise, seed = torch.rand(41, 1, device=device), torch.tensor([3, 5, 7], device=device)

    def call(at):
        part = slice(at, at + 10)
        return langevin_sample(
            energy, init=x[part], labels=labels[part], frozen=frozen[part], first_step=step[part], steps=1,
            clamp=(-bounds[0, at : at + 3], 1 + bounds[1, at : at + 3]), step_size=0.1, noise_scale=noise[part],
            seed=seed[at % 3 : at % 3 + 1], backend="triton",
        )  # fmt: skip

    for at in range(5):
        call(at)
    for kernel in watched.values():
        assert len(kernel.seen) <= 1
    assert sum(map(len, (kernel.seen for kernel in watched.values()))) == (1 if path == "autograd" else 2)
