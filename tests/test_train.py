"""Training: a run that was interrupted ends with the bits of one that was not, and nothing bad is papered over."""

import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastebm import NonFiniteError, checkpoint, evaluate, plot, report
from fastebm import train as training
from fastebm.data import Images, load, load_array
from fastebm.recipe import TrainConfig, recipe
from fastebm.report import fresh_samples
from fastebm.train import Stopped, load_model, saved_config, train

TINY = TrainConfig(
    seed=3,
    steps=6,
    batch_size=8,
    hidden_sizes=(7, 5),
    pool_size=20,
    langevin_steps=2,
    n_fresh=60,
    fresh_steps=3,
    warmup_steps=0,
)


@pytest.fixture(scope="module")
def tiny_images():
    """Images of 3 x 3 in two classes: enough for a run whose report takes no time."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    k = torch.randint(0, 5, (60, 9), generator=generator).float() + 4.0 * labels[:, None] * (torch.arange(9) < 4)
    return Images(k[:40], labels[:40], k[40:], labels[40:], shape=(3, 3), levels=8)


@pytest.fixture(scope="module", autouse=True)
def small_forest():
    """The forest's accuracy is test_evaluate's matter."""
    with pytest.MonkeyPatch.context() as patch:
        small = functools.partial(evaluate.two_sample_accuracy, n_trees=3, n_repeats=1)
        patch.setattr(evaluate, "two_sample_accuracy", small)
        yield


@pytest.fixture
def no_report(monkeypatch):
    """For tests of what training leaves behind."""
    monkeypatch.setattr(training, "_report", lambda *_: {})


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_images):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(TINY, out, data=tiny_images)
    return out


def _same_end(a, b):
    """The model file byte for byte, and every tensor of the checkpoint; then the metrics, without the clock."""
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    (tensors_a, values_a), (tensors_b, values_b) = (checkpoint.read(run / "checkpoint.safetensors") for run in (a, b))
    assert tensors_a.keys() == tensors_b.keys()
    assert all(torch.equal(t, tensors_b[name]) for name, t in tensors_a.items())
    assert {**values_a, "seconds": 0} == {**values_b, "seconds": 0}
    assert _metrics(a) == _metrics(b)


def _metrics(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


@pytest.mark.parametrize("stop_at", range(1, 6))
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, tiny_images, whole, no_report, stop_at):
    done = []
    with pytest.raises(Stopped, match=f"step {stop_at} of 6"):
        train(
            TINY,
            tmp_path / "run",
            data=tiny_images,
            on_step=done.append,
            should_stop=lambda: len(done) == stop_at - 1,
        )
    assert not (tmp_path / "run" / "summary.json").exists()
    train(TINY, tmp_path / "run", data=tiny_images, resume=True)
    _same_end(tmp_path / "run", whole)


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_run_that_was_cut_off_resumes_from_its_last_checkpoint(
    tmp_path, tiny_images, whole, no_report, monkeypatch, at
):
    """KeyboardInterrupt out of the loop, with nothing saved since step 0, 2 or 4."""
    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)

    def cut(row):
        if row["step"] == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path / "run", data=tiny_images, on_step=cut)
    step = checkpoint.read(tmp_path / "run" / "checkpoint.safetensors")[1]["step"]
    assert step == at // 2 * 2
    with open(tmp_path / "run" / "metrics.jsonl", "a") as log:
        log.write('{"step": 7, "lo')  # as a killed process leaves it
    train(TINY, tmp_path / "run", data=tiny_images, resume=True)
    _same_end(tmp_path / "run", whole)


def test_interrupted_in_the_middle_of_a_step(tmp_path, tiny_images, whole, no_report, monkeypatch):
    average = training._Run.average_weights

    def cut(run):
        if run.step == 3:
            raise KeyboardInterrupt
        average(run)

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "average_weights", cut)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, tmp_path / "run", data=tiny_images)
    train(TINY, tmp_path / "run", data=tiny_images, resume=True)
    _same_end(tmp_path / "run", whole)


def test_stopped_while_sampling_and_measuring(tmp_path, tiny_images, whole):
    phases = []
    with pytest.raises(Stopped, match="step 6 of 6"):
        train(
            TINY, tmp_path / "run", data=tiny_images, on_phase=phases.append, should_stop=lambda: len(phases) == 2
        )  # fmt: skip
    assert phases == ["sampling 60 fresh chains: step 3 of 3", "measuring"]
    train(TINY, tmp_path / "run", data=tiny_images, resume=True)
    _same_end(tmp_path / "run", whole)
    clock = ("seconds", "seconds_after_training")
    a, b = (json.loads((run / "summary.json").read_text()) for run in (tmp_path / "run", whole))
    assert {k: v for k, v in a.items() if k not in clock} == {k: v for k, v in b.items() if k not in clock}


def test_another_seed_is_another_run(tmp_path, tiny_images, whole, no_report):
    train(dataclasses.replace(TINY, seed=4), tmp_path / "run", data=tiny_images)
    a, b = (load_file(run / "model.safetensors") for run in (tmp_path / "run", whole))
    assert not torch.equal(a["0.weight"], b["0.weight"])


def test_training_leaves_the_global_generator_alone(tmp_path, tiny_images, no_report):
    before = torch.random.get_rng_state()
    train(TINY, tmp_path / "run", data=tiny_images)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_run_folder_is_complete(whole, tiny_images):
    names = {path.name for path in whole.iterdir()}
    assert names == {
        "config.json", "checkpoint.safetensors", "model.safetensors", "metrics.jsonl", "summary.json",
        "samples.png", "energies.png", "training.png",
    }  # fmt: skip
    assert json.loads((whole / "config.json").read_text()) == dataclasses.replace(TINY, data=tiny_images.info).to_dict()
    assert [row["step"] for row in _metrics(whole)] == [1, 2, 3, 4, 5, 6]
    summary = json.loads((whole / "summary.json").read_text())
    for key in ("auroc_uniform", "auroc_shuffled", "auroc_rotated", "auroc_inverted", "two_sample_accuracy"):
        assert 0.0 <= summary[key] <= 1.0
    assert summary["chain_steps"] == 6 * 8 * 2
    assert sum(summary["class_shares"]) == pytest.approx(1.0)
    assert summary["classes_present"] == sum(share >= 0.01 for share in summary["class_shares"])
    assert summary["seconds"] > 0


def test_training_lowers_the_energy_of_data(tmp_path, tiny_images):
    """Data that fill two corners of the cube against samples that start everywhere: the energy must tell them."""
    config = dataclasses.replace(
        TINY, steps=150, hidden_sizes=(32,), pool_size=200, batch_size=40, langevin_steps=5, learning_rate=3e-3
    )
    summary = train(config, tmp_path / "run", data=tiny_images)
    assert summary["auroc_uniform"] > 0.75


# -- planes and tables ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gaussians(tmp_path_factory):
    """A function of dims: a file of a Gaussian, whose columns hang together, as the user's own data."""

    def points(dim):
        rng = np.random.default_rng(dim)
        path = tmp_path_factory.mktemp("data") / f"gaussian-{dim}.npy"
        np.save(path, 100.0 + rng.normal(size=(400, dim)) @ rng.normal(size=(dim, dim)))
        return load_array(path)

    return points


def _small(data, **changes):
    tiny = {"seed": 0, "steps": 6, "batch_size": 8, "pool_size": 20, "hidden_sizes": (7, 5), "n_fresh": 30}
    return TrainConfig(**{**recipe(data), **tiny, "fresh_steps": 3, **changes})


@pytest.mark.parametrize("dim", [1, 2, 14])
def test_a_table_or_plane_is_reported_and_resumed_from_its_folder_alone(tmp_path, gaussians, dim):
    config = _small(gaussians(dim))
    with pytest.raises(Stopped):
        train(config, tmp_path / "run", should_stop=lambda: True)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["offset"] == list(config.data.offset)
    summary = train(saved_config(tmp_path / "run"), tmp_path / "run", resume=True)
    aurocs = {"auroc_uniform", "auroc_shuffled"} if dim == 14 else {"auroc_uniform"}
    assert {key for key in summary if key.startswith("auroc")} == aurocs
    assert ("log_likelihood" in summary) == (dim == 2)
    assert 0.0 <= summary["two_sample_accuracy"] <= 1.0
    for name in ("samples", "energies", "training"):
        assert (tmp_path / "run" / f"{name}.png").stat().st_size > 10_000


def test_a_run_whose_file_has_changed_does_not_go_on(tmp_path, gaussians):
    data = gaussians(3)
    with pytest.raises(Stopped):
        train(_small(data), tmp_path / "run", should_stop=lambda: True)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    np.save(data.info.name, np.random.default_rng(1).normal(size=(400, 3)))
    with pytest.raises(ValueError, match="has changed since the run began"):
        train(saved_config(tmp_path / "run"), tmp_path / "run", resume=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_known_outliers_are_measured_beside_plain_detectors(tmp_path):
    data = load("breast_cancer")
    summary = train(_small(data), tmp_path / "run", data=data)
    assert {"auroc_malignant", "auroc_malignant_isolation_forest", "auroc_malignant_mahalanobis"} <= summary.keys()
    assert summary["auroc_malignant_isolation_forest"] > 0.8  # whatever six steps make of the energy


def test_the_density_of_a_known_energy():
    """A Gaussian's, in the data's units: its values, and its log Z."""
    info = load("moons").info

    class Gaussian(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(0.3))

        def forward(self, x):
            return 0.5 * (x / self.scale).square().sum(1, keepdim=True)

    edges, p, log_z = report.density(Gaussian(), info)
    assert log_z == pytest.approx(np.log(2 * np.pi * 0.09), abs=1e-5)
    x, y = 0.5 * (edges[1:] + edges[:-1]).T
    sigma = 0.3 * np.array(info.scale)
    expected = np.outer(
        np.exp(-0.5 * ((y - info.offset[1]) / sigma[1]) ** 2), np.exp(-0.5 * ((x - info.offset[0]) / sigma[0]) ** 2)
    ) / (2 * np.pi * sigma.prod())
    np.testing.assert_allclose(p, expected, atol=1e-5 * expected.max())


@pytest.mark.slow
def test_a_toy_is_learned(tmp_path):
    """The recipe in a fifth of its steps: nearer to the moons' density than the best Gaussian by half a nat."""
    data = load("moons")
    summary = train(TrainConfig(**{**recipe(data), "steps": 500}), tmp_path / "run", data=data)
    x = data.info.to_data(data.train)
    gaussian = -0.5 * np.linalg.slogdet(np.cov(x.T))[1] - np.log(2 * np.pi) - 1.0
    assert summary["log_likelihood"] > gaussian + 0.5
    assert summary["two_sample_accuracy"] < 0.7


# -- bad folders and files ----------------------------------------------------------------------------------


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(whole, tiny_images):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    with pytest.raises(ValueError, match="already holds a run"):
        train(TINY, whole, data=tiny_images)
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_a_folder_with_other_things_is_refused(tmp_path, tiny_images):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        train(TINY, tmp_path, data=tiny_images)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_nothing_is_written_for_a_backend_that_cannot_run(tmp_path, tiny_images, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    config = dataclasses.replace(TINY, backend="triton", device="cpu")
    with pytest.raises(ValueError, match="can't run"):
        train(config, tmp_path / "run", data=tiny_images)
    assert not (tmp_path / "run").exists()


def test_resuming_a_damaged_run_changes_nothing(tmp_path, tiny_images):
    with pytest.raises(Stopped):
        train(TINY, tmp_path / "run", data=tiny_images, should_stop=lambda: True)
    path = tmp_path / "run" / "checkpoint.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data)
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is damaged"):
        train(TINY, path.parent, data=tiny_images, resume=True)
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


def test_resuming_with_another_configuration_is_refused(tmp_path, tiny_images, whole):
    with pytest.raises(ValueError, match="another configuration"):
        train(dataclasses.replace(TINY, steps=7), whole, data=tiny_images, resume=True)
    with pytest.raises(ValueError, match="no run to resume"):
        train(TINY, tmp_path, data=tiny_images, resume=True)


def test_an_edited_config_is_not_silently_ignored(tmp_path, tiny_images):
    with pytest.raises(Stopped):
        train(TINY, tmp_path / "run", data=tiny_images, should_stop=lambda: True)
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"steps": 6', '"steps": 60'))
    with pytest.raises(ValueError, match="undo the change"):
        train(TINY, tmp_path / "run", data=tiny_images, resume=True)


def test_a_model_file_of_another_kind_is_refused(tmp_path, tiny_images, whole):
    (tmp_path / "model.safetensors").write_bytes((whole / "checkpoint.safetensors").read_bytes())
    with pytest.raises(ValueError, match="does not hold the energy"):
        load_model(tmp_path)
    (tmp_path / "checkpoint.safetensors").write_bytes((whole / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="holds no training run"):
        train(TINY, tmp_path, data=tiny_images, resume=True)


# -- explosions ---------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, tiny_images, monkeypatch):
    loss = training.contrastive_divergence_loss
    calls = []

    def broken(*args):
        calls.append(1)
        return loss(*args) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(training, "CHECKPOINT_EVERY", 2)
    monkeypatch.setattr(training, "contrastive_divergence_loss", broken)
    with pytest.raises(NonFiniteError, match=r"step 4: the loss is nan .* learning_rate"):
        train(TINY, tmp_path / "run", data=tiny_images)
    tensors, values = checkpoint.read(tmp_path / "run" / "checkpoint.safetensors")
    assert values["step"] == 2
    assert all(t.isfinite().all() for k, t in tensors.items() if t.is_floating_point() and k != "pool.energy")


def test_chains_that_explode_stop_the_run(tmp_path, tiny_images):
    config = dataclasses.replace(TINY, drift=1e38, clamp=None, langevin_steps=200)
    with pytest.raises(NonFiniteError, match=r"training failed in step 1: .* chains are not finite"):
        train(config, tmp_path / "run", data=tiny_images)
    assert checkpoint.read(tmp_path / "run" / "checkpoint.safetensors")[1]["step"] == 0


# -- configuration, data, samples ---------------------------------------------------------------------------


def test_config_survives_json():
    config = dataclasses.replace(TINY, grad_clip=0.5, clamp=None, max_grad_norm=None)
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="missing or unknown: momentum"):
        TrainConfig.from_dict({**TINY.to_dict(), "momentum": 1})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be an int >= 1, got 0"),
        ({"batch_size": 2.0}, "batch_size must be an int"),
        ({"batch_size": 21}, "batch_size must be <= pool_size"),
        ({"seed": -1}, "seed must be"),
        ({"drift": float("nan")}, "drift must be a number > 0, got nan"),
        ({"learning_rate": 0.0}, "learning_rate must be a number > 0"),
        ({"restart_prob": 1.5}, r"restart_prob must be a number in \[0, 1\]"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"decay": "step"}, "decay must be"),
        ({"clamp": (1.0, 0.0)}, "clamp needs lo < hi"),
        ({"grad_clip": 0.0}, "grad_clip must be"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be"),
        ({"dequantisation": 0.5, "data": load("moons").info}, "dequantisation is for images: it must be 0, got 0.5"),
    ],
)
def test_config_refuses_impossible_values(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_learning_rate_goes_from_its_value_to_zero():
    for decay, middle in (("cosine", 0.5), ("linear", 0.5), ("none", 1.0)):
        config = dataclasses.replace(TINY, learning_rate=0.01, decay=decay)
        assert config.learning_rate_at(0) == 0.01
        assert config.learning_rate_at(3) == pytest.approx(0.01 * middle)
        assert config.learning_rate_at(6) == pytest.approx(0.01 if decay == "none" else 0.0)


def test_noise_cools_over_the_last_part_of_every_block():
    config = dataclasses.replace(TINY, noise_std=0.02, drift=0.5, langevin_steps=5, cooling=0.8)
    block = [0.02, 0.015, 0.01, 0.005, 0.0]
    assert config.sampler(10).noise_scale.tolist() == pytest.approx(block * 2)
    assert config.sampler(7).noise_scale.tolist() == pytest.approx(block[-2:] + block)
    assert config.sampler(7).step_size == 1.0
    assert dataclasses.replace(config, cooling=0.0).sampler(3).noise_scale.tolist() == pytest.approx([0.02] * 3)


def test_learning_rate_warms_up():
    config = dataclasses.replace(TINY, learning_rate=0.01, decay="none", warmup_steps=4)
    assert [config.learning_rate_at(step) for step in range(5)] == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01])


def test_fresh_samples_do_not_depend_on_their_number_or_on_the_chunks(whole, tiny_images, monkeypatch):
    model, config = load_model(whole)
    assert config == dataclasses.replace(TINY, data=tiny_images.info)
    many, info = fresh_samples(model, config, 20, dim=9, steps=7, seed=1)
    monkeypatch.setattr(report, "_FRESH_CHUNK", 3)
    seen = []
    few, _ = fresh_samples(model, config, 4, dim=9, steps=7, seed=1, on_steps=lambda *done: seen.append(done))
    assert torch.equal(many[:4], few)
    assert seen == [(3, 7), (6, 7), (7, 7)]
    assert info.backend in ("torch", "triton")
    assert not torch.equal(many, fresh_samples(model, config, 20, dim=9, steps=7, seed=2)[0])


def test_figures_show_what_they_are_given():
    grid = plot._mosaic(np.ones((3, 2, 2)), columns=2)
    assert grid.shape == (7, 7)
    assert np.nansum(grid) == 12  # three images of four pixels; gaps and the missing fourth are blank
    figure = plot.energies_figure({"a": [0.0, 1.0], "b": [2.0, 5.0], "c": [3.0]}, ["c"])
    legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes]
    assert legends == [["a", "b", "c"], ["c"]]
    with pytest.raises(ValueError, match=r"got shape \(0, 8, 8\)"):
        plot.samples_figure({"none": np.zeros((0, 8, 8))})
    with pytest.raises(ValueError, match="no step"):
        plot.training_figure([])
