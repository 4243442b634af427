"""Training: a run that was interrupted ends with the bits of one that was not, and nothing bad is papered over."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import TINY, content, images, metrics, newest, same_end, tree

from fastebm import ContrastiveDivergence, NonFiniteError, evaluate
from fastebm.data.sets import load
from fastebm.data.tables import load_array
from fastebm.train import apply
from fastebm.train import loop as training
from fastebm.train.apply import fresh_samples
from fastebm.train.folder import load_model, saved_config
from fastebm.train.loop import Stopped, train
from fastebm.train.recipe import TrainConfig, recipe
from fastebm.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("few_trees")


@pytest.fixture(scope="module")
def tiny_images():
    return images()


@pytest.fixture
def no_report(monkeypatch):
    """For tests of what training leaves behind."""
    monkeypatch.setattr(training, "write_report", lambda *_: {})


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_images):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(TINY, out, data=tiny_images)
    return out


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
    same_end(tmp_path / "run", whole)


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_a_run_that_was_cut_off_resumes_from_its_last_checkpoint(tmp_path, tiny_images, whole, no_report, at):
    """KeyboardInterrupt out of the loop, with nothing saved since step 0, 2 or 4."""

    def cut(row):
        if row["step"] == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(TINY, tmp_path / "run", data=tiny_images, on_step=cut, checkpoint_every=2)
    assert newest(tmp_path / "run").step == at // 2 * 2
    with open(tmp_path / "run" / "metrics.jsonl", "a") as log:
        log.write('{"step": 7, "lo')  # as a killed process leaves it
    train(TINY, tmp_path / "run", data=tiny_images, resume=True)
    same_end(tmp_path / "run", whole)


def test_interrupted_in_the_middle_of_a_step(tmp_path, tiny_images, whole, no_report, monkeypatch):
    average = Trainer._average_weights

    def cut(trainer):
        if trainer.steps_done == 3:
            raise KeyboardInterrupt
        average(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_average_weights", cut)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, tmp_path / "run", data=tiny_images)
    train(TINY, tmp_path / "run", data=tiny_images, resume=True)
    same_end(tmp_path / "run", whole)


def test_stopped_while_sampling_and_measuring(tmp_path, tiny_images, whole):
    phases = []
    with pytest.raises(Stopped, match="step 6 of 6"):
        train(
            TINY, tmp_path / "run", data=tiny_images, on_phase=lambda *phase: phases.append(phase),
            should_stop=lambda: len(phases) == 6,
        )  # fmt: skip
    sampling = "sampling 60 fresh chains"
    assert phases[0] == (sampling, 0, 3)
    assert (sampling, 3, 3) in phases
    assert phases[-1][0] == "measuring"
    train(TINY, tmp_path / "run", data=tiny_images, resume=True)
    same_end(tmp_path / "run", whole)
    clock = ("seconds", "seconds_after_training")
    a, b = (json.loads((run / "summary.json").read_text()) for run in (tmp_path / "run", whole))
    assert {k: v for k, v in a.items() if k not in clock} == {k: v for k, v in b.items() if k not in clock}


def test_another_seed_is_another_run(tmp_path, tiny_images, whole, no_report):
    train(dataclasses.replace(TINY, seed=4), tmp_path / "run", data=tiny_images)
    a, b = (load_file(newest(run).path / "model.safetensors") for run in (tmp_path / "run", whole))
    assert not torch.equal(a["0.weight"], b["0.weight"])


def test_training_leaves_the_global_generator_alone(tmp_path, tiny_images, no_report):
    before = torch.random.get_rng_state()
    train(TINY, tmp_path / "run", data=tiny_images)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_run_folder_is_complete(whole, tiny_images):
    names = {path.name for path in whole.iterdir()}
    assert names == {
        ".lock", "config.json", "checkpoints", "metrics.jsonl", "summary.json", "samples.png", "energies.png",
        "training.png", "train_energies.npy",
    }  # fmt: skip
    assert tree(whole / "checkpoints") == {"LATEST"} | {
        f"step-0000000{step}/{name}"
        for step in (0, 6)
        for name in ("manifest.json", "model.safetensors", "state.safetensors", "rows-0.safetensors")
    }
    assert json.loads((whole / "config.json").read_text()) == dataclasses.replace(TINY, data=tiny_images.info).to_dict()
    assert [row["step"] for row in metrics(whole)] == [1, 2, 3, 4, 5, 6]
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


@pytest.mark.parametrize("dim", [1, pytest.param(2, marks=pytest.mark.slow), 14])
def test_a_table_or_plane_is_reported_and_resumed_from_its_folder_alone(tmp_path, gaussians, dim):
    config = _small(gaussians(dim))
    with pytest.raises(Stopped):
        train(config, tmp_path / "run", should_stop=lambda: True)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["offset"] == list(config.data.offset)
    summary = train(saved_config(tmp_path / "run"), tmp_path / "run", resume=True)
    aurocs = {"auroc_uniform", "auroc_shuffled"} if dim == 14 else {"auroc_uniform"}
    assert {key for key in summary if key.startswith("auroc")} == aurocs
    assert 0.0 <= summary["two_sample_accuracy"] <= 1.0
    for name in ("samples", "energies", "training"):
        assert (tmp_path / "run" / f"{name}.png").stat().st_size > 10_000


def test_a_run_whose_file_has_changed_does_not_go_on(tmp_path, gaussians):
    data = gaussians(3)
    with pytest.raises(Stopped):
        train(_small(data), tmp_path / "run", should_stop=lambda: True)
    before = content(tmp_path / "run")
    np.save(data.info.name, np.random.default_rng(1).normal(size=(400, 3)))
    with pytest.raises(ValueError, match="has changed since the run began"):
        train(saved_config(tmp_path / "run"), tmp_path / "run", resume=True)
    assert content(tmp_path / "run") == before


@pytest.mark.slow
def test_known_outliers_are_measured_beside_plain_detectors(tmp_path):
    data = load("breast_cancer")
    summary = train(_small(data), tmp_path / "run", data=data)
    assert {"auroc_malignant", "auroc_malignant_isolation_forest", "auroc_malignant_mahalanobis"} <= summary.keys()
    assert summary["auroc_malignant_isolation_forest"] > 0.8  # whatever six steps make of the energy


def test_the_landscape_is_the_energy_where_the_axes_say():
    """A paraboloid around a point of the data's own plane."""
    info = load("moons").info
    at = info.to_states([[1.0, 0.5]])

    class Paraboloid(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.centre = torch.nn.Parameter(at[0])

        def forward(self, x):
            return (x - self.centre).square().sum(1, keepdim=True)

    edges, energies = apply.landscape(Paraboloid(), info)
    assert np.allclose(info.to_states(edges[[0, -1]]), [[lo, lo] for lo in info.clamp])
    row, column = np.unravel_index(energies.argmin(), energies.shape)
    assert edges[column, 0] <= 1.0 <= edges[column + 1, 0]
    assert edges[row, 1] <= 0.5 <= edges[row + 1, 1]


@pytest.mark.slow
def test_a_toy_is_learned(tmp_path):
    """The recipe in a quarter of its steps: samples are nearer to the moons than a Gaussian of their moments."""
    data = load("moons")
    config = TrainConfig(**{**recipe(data), "steps": 500})
    summary = train(config, tmp_path / "run", data=data)
    gaussian = np.random.default_rng(0).multivariate_normal([0, 0], np.cov(data.train.T.numpy()), 1000)
    others = evaluate.two_sample_accuracy(data.test.numpy(), gaussian)
    assert summary["two_sample_accuracy"] < 0.62 < 0.72 < others


# -- explosions ---------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, tiny_images, monkeypatch):
    forward = ContrastiveDivergence.forward
    calls = []

    def broken(*args, **options):
        calls.append(1)
        found = forward(*args, **options)
        return found._replace(loss=found.loss * (float("nan") if len(calls) == 4 else 1.0))

    monkeypatch.setattr(ContrastiveDivergence, "forward", broken)
    with pytest.raises(NonFiniteError, match=r"step 4: the loss is nan .* learning_rate"):
        train(TINY, tmp_path / "run", data=tiny_images, checkpoint_every=2)
    saved = newest(tmp_path / "run")
    assert saved.step == 2
    tensors = {**saved.tensors("state"), "x": saved.rows(0, 20)["x"]}
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


def test_chains_that_explode_stop_the_run(tmp_path, tiny_images):
    config = dataclasses.replace(TINY, drift=1e38, clamp=None, langevin_steps=200)
    with pytest.raises(NonFiniteError, match=r"training failed in step 1: .* chains are not finite"):
        train(config, tmp_path / "run", data=tiny_images)
    assert newest(tmp_path / "run").step == 0


# -- fresh samples --------------------------------------------------------------------------------------------


def test_fresh_samples_do_not_depend_on_their_number_or_on_the_chunks(whole, tiny_images, monkeypatch):
    model, config = load_model(whole)
    assert config == dataclasses.replace(TINY, data=tiny_images.info)
    many, info = fresh_samples(model, config, 20, dim=9, steps=7, seed=1)
    monkeypatch.setattr(apply, "MAX_STEPS_PER_CALL", 3)
    seen = []
    few, _ = fresh_samples(model, config, 4, dim=9, steps=7, seed=1, on_steps=lambda *done: seen.append(done))
    assert torch.equal(many[:4], few)
    assert (seen[0], seen[-1]) == ((0, 7), (7, 7))
    assert all(0 < b - a <= 3 for (a, _), (b, _) in itertools.pairwise(seen))
    assert info.backend in ("torch", "triton")
    assert not torch.equal(many, fresh_samples(model, config, 20, dim=9, steps=7, seed=2)[0])
