"""langevin_sample with trajectories, labels, seeds in tensors and its other options, on each backend."""

import pytest
import torch
from paths import CLASSES, every_backend, make_energy, network
from torch import nn

import fastebm
from fastebm import ClassifierEnergy, GaussianEnergy, SumEnergy, langevin_sample
from fastebm.backends.choose import multiplies_bf16

# The interpreter computes in NumPy, which warns where a GPU overflows silently.
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

DIM = 5


def images(classes=None):
    """An energy on (2, 3) states."""
    return nn.Sequential(nn.Flatten(), network(6, [9], classes or 1))


@every_backend
def test_trajectory_and_info_of_a_call(backend, home):
    energy = SumEnergy([ClassifierEnergy(images(CLASSES)), GaussianEnergy(torch.ones(2, 3))]).to(home)
    init = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0)).to(home)
    labels = torch.arange(7, device=home, dtype=torch.int32) % CLASSES
    frozen = torch.tensor([[True, False, False], [False, False, True]], device=home)
    options = {
        "init": init, "labels": labels, "frozen": frozen, "steps": 4, "step_size": 0.3, "noise_scale": 0.5, "seed": 1,
        "clamp": (torch.full((2, 3), -0.5), 1.0), "grad_norm_clip": 1.0, "grad_clip": 0.8, "backend": backend,
    }  # fmt: skip
    samples = langevin_sample(energy, **options)
    same, info = langevin_sample(energy, return_info=True, **options)
    assert torch.equal(same, samples)
    assert samples.shape == (7, 2, 3)
    whole = langevin_sample(energy, return_trajectory=True, **options)
    assert whole.shape == (7, 4, 2, 3)
    assert torch.equal(whole[:, -1], samples)
    thinned, thinned_info = langevin_sample(energy, return_trajectory=True, thin=2, return_info=True, **options)
    assert torch.equal(thinned, whole[:, 1::2])
    out = torch.full((7, 2, 2, 3), torch.nan, device=home)
    assert langevin_sample(energy, return_trajectory=True, thin=2, out=out, **options) is out
    assert torch.equal(out, thinned)
    assert torch.equal(samples[:, frozen], init[:, frozen])
    assert bool(((samples >= -0.5) & (samples <= 1.0))[:, ~frozen].all())
    # the same mask, given per chain
    masks = frozen.expand(7, 2, 3)
    assert torch.equal(langevin_sample(energy, **{**options, "frozen": masks}), samples)
    for name in ("energies", "first_bad_step", "grad_norm", "clipped", "clamped"):
        assert torch.equal(getattr(info, name), getattr(thinned_info, name))
        assert getattr(info, name).shape == (7,)
    expected = fastebm.energy(energy, samples, labels=labels.long()).detach()
    torch.testing.assert_close(info.energies, expected, rtol=1e-4, atol=1e-4)
    before = fastebm.energy(energy, (state := whole[:, -2].clone().requires_grad_()), labels=labels.long()).sum()
    (grad,) = torch.autograd.grad(before, state)
    norm = torch.linalg.vector_norm(grad.masked_fill(frozen, 0.0).flatten(1), dim=1)
    torch.testing.assert_close(info.grad_norm, norm, rtol=1e-3, atol=1e-3)
    assert info.path == {"reference": "autograd", "torch": "tiles", "triton": "resident"}[backend]


@every_backend
def test_conditional_samples_move_with_their_labels(backend, home):
    energy = make_energy(DIM, head="class").to(home)
    init = torch.randn(1, DIM, generator=torch.Generator().manual_seed(0)).to(home).expand(CLASSES, DIM)
    options = {"init": init, "steps": 3, "step_size": 0.3, "noise_scale": 0.0, "seed": 1, "backend": backend}
    labels = torch.arange(CLASSES, device=home)
    samples = langevin_sample(energy, labels=labels, **options)
    turned = langevin_sample(energy, labels=labels.flip(0), **options)
    assert len(samples.unique(dim=0)) == CLASSES
    if backend == "reference":  # plain matrix products may round a row by its place
        torch.testing.assert_close(turned, samples.flip(0))
    else:
        assert torch.equal(turned, samples.flip(0))
    plain = langevin_sample(energy, **options)
    torch.testing.assert_close(plain, plain[:1].expand_as(plain))
    assert not torch.equal(plain[0], samples[0])


@every_backend
@pytest.mark.parametrize("make", [lambda: make_energy(DIM), lambda: SumEnergy([GaussianEnergy(torch.zeros(DIM))])])
@pytest.mark.parametrize(
    "seed", [7, 2**64 - 3, -2, *(pytest.param(s, marks=pytest.mark.slow) for s in (0, 2**63 - 1, 2**63))]
)
def test_a_seed_in_a_tensor_is_the_seed(backend, home, make, seed):
    energy = make().to(home)
    tensor = torch.tensor([seed - 2**64 if seed >= 2**63 else seed], device=home)
    options = {"batch_size": 5, "steps": 2, "step_size": 0.3, "noise_scale": 1.0, "backend": backend}
    samples = langevin_sample(energy, DIM, seed=seed, **options)
    for form in (tensor, tensor.reshape(()), tensor.reshape(1, 1)):
        drawn, info = langevin_sample(energy, DIM, seed=form, return_info=True, **options)
        assert torch.equal(drawn, samples)
        assert int(info.seed) == int(tensor)
    assert not torch.equal(langevin_sample(energy, DIM, seed=tensor + 1, **options), samples)


@every_backend
@pytest.mark.parametrize("make", [lambda: make_energy(DIM), lambda: SumEnergy([GaussianEnergy(torch.zeros(DIM))])])
def test_first_steps_in_a_tensor(backend, home, make):
    energy, init = make().to(home), torch.randn(6, DIM, generator=torch.Generator().manual_seed(0)).to(home)
    options = {"steps": 2, "step_size": 0.3, "noise_scale": 1.0, "backend": backend, "seed": 3}
    expected = langevin_sample(energy, init=init, first_step=11, **options)
    for form in (torch.tensor(11), torch.tensor([11]), torch.full((6,), 11)):
        assert torch.equal(langevin_sample(energy, init=init, first_step=form.to(home), **options), expected)
    ages = torch.tensor([5, 0, 11, 2**32 - 2, 11, 7])
    each = langevin_sample(energy, init=init, first_step=ages.to(home), **options)
    for i, age in enumerate(ages.tolist()):
        alone = langevin_sample(energy, init=init[i : i + 1], first_chain=i, first_step=age, **options)
        if backend == "reference":  # plain matrix products round a row by the size of the batch
            torch.testing.assert_close(each[i : i + 1], alone)
        else:
            assert torch.equal(each[i : i + 1], alone)


@every_backend
def test_precision_follows_pytorchs_setting(backend, home):
    energy, before = make_energy(DIM).to(home), torch.get_float32_matmul_precision()
    options = {"batch_size": 5, "steps": 1, "step_size": 0.3, "seed": 3, "backend": backend, "return_info": True}
    try:
        for setting, name in (("highest", "bf16x3"), ("high", "bf16x3"), ("medium", "bf16")):
            torch.set_float32_matmul_precision(setting)
            samples, info = langevin_sample(energy, **options)
            asked, same = langevin_sample(energy, precision=name, **options)
            _, other = langevin_sample(energy, precision="tf32", **options)
            assert torch.equal(samples, asked)
            # a CPU with bf16 instructions uses them if PyTorch is set to that precision
            in_bf16 = backend == "torch" and name == "bf16" and torch.device(home).type == "cpu" and multiplies_bf16()
            assert info.precision == same.precision == (name if backend == "triton" or in_bf16 else "ieee")
            assert other.precision == ("tf32" if backend == "triton" else "ieee")
    finally:
        torch.set_float32_matmul_precision(before)


def test_an_mlp_too_wide_for_the_kernel_takes_library_products(device, monkeypatch):
    energy = make_energy(DIM, head="class", terms=("gaussian",)).to(device)
    options = {
        "init": torch.ones(5, DIM, device=device), "labels": torch.tensor([0, 1, 2, 0, 1], device=device), "steps": 2,
        "step_size": 0.3, "seed": 3, "backend": "triton", "return_info": True,
    }  # fmt: skip
    expected, _ = langevin_sample(energy, precision="ieee", **options)
    # the interpreter has no shared memory that a wide MLP could exceed
    monkeypatch.setattr("fastebm.kernels.triton.launch.choose_launch", lambda *arguments: "too wide")
    samples, info = langevin_sample(energy, **options)
    assert (info.backend, info.path, info.precision) == ("triton", "products", "ieee")
    assert info.why_not_fused.startswith("too wide; the closed-form gradient runs instead, by library products")
    torch.testing.assert_close(samples, expected, rtol=1e-5, atol=1e-5)
    values = fastebm.energy(energy, samples, labels=options["labels"]).detach()
    torch.testing.assert_close(info.energies, values, rtol=1e-5, atol=1e-5)
