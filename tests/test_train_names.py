"""Every objective, model and sampler by name: a run resumes bit for bit, is reported, sampled and scored."""

import json

import numpy as np
import pytest
import torch
from tiny_runs import images, metrics, same_end, tree

import fastebm
from fastebm.cli.settings import parsed
from fastebm.data.dataset import Images
from fastebm.data.sets import load
from fastebm.train import loop as training
from fastebm.train.apply import fresh_samples
from fastebm.train.folder import load_model
from fastebm.train.loop import Stopped, train
from fastebm.train.models import MODELS, build_model
from fastebm.train.objectives import OBJECTIVES
from fastebm.train.recipe import TrainConfig, configured
from fastebm.train.samplers import SAMPLERS

pytestmark = pytest.mark.usefixtures("few_trees")

SMALL = {
    "seed": 3, "steps": 6, "batch_size": 8, "hidden_sizes": (7, 5), "pool_size": 20, "langevin_steps": 2, "n_fresh": 60,
    "fresh_steps": 8, "warmup_steps": 0, "device": "cpu",
}  # fmt: skip

# What makes the tiny runs of some names small.
OPTIONS = {
    "nce": {"objective_options": {"n_components": 2}},
    "ranking_nce": {"objective_options": {"n_components": 2}},
    "diffusion_recovery": {"objective_options": {"sigmas": (2.0, 0.5, 0.1), "sampler_steps": 2}},
    "multi_dsm": {"sampler_options": {"n_levels": 4}},
    "vp_dsm": {"sampler_options": {"n_levels": 4}},
}


def tiny(objective, **changes):
    return configured(images(), {**SMALL, "objective": objective, **OPTIONS.get(objective, {}), **changes})


@pytest.fixture
def no_report(monkeypatch):
    monkeypatch.setattr(training, "write_report", lambda *_: {})


def resumed_equals_uninterrupted(tmp_path, config):
    train(config, tmp_path / "whole", data=images())
    done = []
    with pytest.raises(Stopped, match="step 3 of 6"):
        train(
            config, tmp_path / "run", data=images(), on_step=done.append, should_stop=lambda: len(done) == 2
        )  # fmt: skip
    train(config, tmp_path / "run", data=images(), resume=True)
    same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_stopped_run_of_any_objective_resumes_bit_for_bit(tmp_path, no_report, objective):
    resumed_equals_uninterrupted(tmp_path, tiny(objective))


@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "pcd", "model": "conditional"},
        {"objective": "dsm", "model": "conv", "model_options": {"channels": (4, 6)}},
        {"objective": "pcd", "model": "resnet", "model_options": {"channels": (4, 4), "spectral_norm": True}},
        {"objective": "multi_dsm", "model_options": {"trunk": "conv", "channels": (4,)}, **OPTIONS["multi_dsm"]},
        {"objective": "cd", "sampler": "hmc", "sampler_options": {"n_leapfrog": 2}},
        {"objective": "pcd", "sampler": "mala"},
        {"objective": "pcd", "sampler": "underdamped"},
    ],
    ids=lambda changes: "-".join(str(v) for v in changes.values() if isinstance(v, str)),
)
def test_a_stopped_run_of_any_model_and_sampler_resumes_bit_for_bit(tmp_path, no_report, changes):
    resumed_equals_uninterrupted(tmp_path, tiny(**changes))


@pytest.mark.parametrize("objective", ["jem", "multi_dsm", "vp_dsm", "nce", "diffusion_recovery", "cooperative"])
def test_a_run_of_any_objective_is_reported_sampled_and_scored(tmp_path, objective):
    summary = train(tiny(objective), tmp_path / "run", data=images())
    assert {"samples.png", "energies.png", "training.png", "train_energies.npy"} <= tree(tmp_path / "run")
    assert 0 <= summary["auroc_uniform"] <= 1
    assert ("accuracy" in summary) == (objective == "jem")
    run = fastebm.load(tmp_path / "run")
    assert run.config.objective == objective
    x = run.sample(5, seed=1)
    assert x.shape == (5, 3, 3)
    assert np.array_equal(x, run.sample(5, seed=1))
    assert not np.array_equal(x, run.sample(5, seed=2))
    energies = run.energy(x.clip(0, 1))
    assert energies.shape == (5,)
    assert ((run.percentile(energies) >= 0) & (run.percentile(energies) <= 100)).all()


def test_energies_of_pairs_have_features_and_nothing_to_sample(tmp_path):
    summary = train(tiny("infonce"), tmp_path / "run", data=images())
    assert 0 <= summary["knn_accuracy"] <= 1
    assert summary["knn_accuracy_of_pixels"] > 0.9  # two classes that are far apart
    assert "samples.png" not in tree(tmp_path / "run")
    run = fastebm.load(tmp_path / "run")
    x = np.random.default_rng(0).random((5, 9))
    assert torch.allclose(run.features(x).norm(dim=1), torch.ones(5))
    for refused in (lambda: run.sample(3), lambda: run.energy(x)):
        with pytest.raises(ValueError, match="infonce trains energies of pairs of rows: a row has features"):
            refused()


def test_only_energies_of_pairs_have_features(tmp_path, no_report):
    train(tiny("dsm"), tmp_path / "run", data=images())
    model, config = load_model(tmp_path / "run")
    with pytest.raises(ValueError, match="by dsm: features are infonce's"):
        fastebm.TrainedRun(model, config, np.zeros(1)).features(np.zeros((1, 9)))


@pytest.mark.parametrize(
    ("objective", "sampler"),
    [(o, s) for o in ("dsm", "multi_dsm", "vp_dsm", "pcd") for s in OBJECTIVES[o].samplers],
)
def test_every_sampler_draws_fresh_samples_that_depend_on_their_seed_alone(objective, sampler):
    options = {"sampler_options": {"n_temperatures": 2}} if sampler == "tempering" else {"sampler_options": {}}
    config = tiny(objective, sampler=sampler, **options)
    model, shown = build_model(config), []
    x, info = fresh_samples(model, config, 6, dim=9, seed=1, on_steps=lambda *done: shown.append(done))
    assert x.shape == (6, 9)
    assert x.isfinite().all()
    assert info.backend in ("torch", "triton")
    assert shown[0][0] == 0
    assert shown[-1][0] == shown[-1][1] > 0
    assert torch.equal(x, fresh_samples(model, config, 6, dim=9, seed=1)[0])
    assert not torch.equal(x, fresh_samples(model, config, 6, dim=9, seed=2)[0])


def test_fresh_chains_of_a_conditional_energy_have_classes_in_turn():
    config = tiny("pcd", model="conditional", fresh_steps=50)
    model = build_model(config)
    with torch.no_grad():  # a class whose energy rises with the first pixel, and one whose energy falls
        for p in model.parameters():
            p.zero_()
        trunk, projection = model.classifier
        trunk[0].weight[0, 0] = 30.0
        trunk[-3].weight[0, 0] = trunk[-1].weight[0, 0] = 1.0
        projection.classes.weight[:, 0] = torch.tensor([1.0, -1.0])
    x, _ = fresh_samples(model, config, 40, dim=9, seed=0)
    assert x[::2, 0].mean() > x[1::2, 0].mean() + 0.2


# -- names and options ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        ("moons", {"objective": "jem"}, "the model classifier needs classes, and moons has none: take digits"),
        ("moons", {"objective": "pcd", "model": "conv"}, "conv and resnet are for images, and moons has rows of 2"),
        ("moons", {"objective": "dms"}, r"there is no objective 'dms': did you mean dsm\?"),
        ("moons", {"model": "cnn"}, "there is no model 'cnn' .there are mlp, conv"),
        (
            "moons",
            {"objective": "multi_dsm", "model": "mlp"},
            "multi_dsm goes with the model noise_conditional, got mlp",
        ),
        ("moons", {"objective": "multi_dsm", "sampler": "mala"}, "goes with the sampler annealed or pred.*, got mala"),
        ("moons", {"objective": "pcd", "sampler": "annealed"}, "goes with the sampler langevin or mala"),
        ("moons", {"objective_options": {"sigma": 1.0}}, "the objective pcd has no option 'sigma'"),
        (
            "moons",
            {"objective": "dsm", "objective_options": {"sgima": 1.0}},
            r"the objective dsm has no option 'sgima': did you mean sigma\?",
        ),
        ("moons", {"objective": "dsm", "objective_options": {"sigma": "x"}}, "sigma must be"),
        ("moons", {"objective": "nce", "objective_options": {"noise": "pink"}}, "objective.noise must be gaussian"),
        ("moons", {"model_options": {"input_size": 3}}, "the model mlp has no option 'input_size'"),
        ("moons", {"sampler_options": {"step_size": 3}}, "the sampler langevin has no option 'step_size'"),
        (
            "moons",
            {"objective": "energy_discrepancy", "objective_options": {"n_negatives": 10**9}},
            "GiB, and cpu has .* for a batch_size of 8: take less",
        ),
        ("moons", {"objective_learning_rate": 0.0}, "objective_learning_rate must be a number > 0, or None"),
    ],
)
def test_names_and_options_that_do_not_go_together_are_refused_before_anything_is_written(
    tmp_path, data, changes, message
):
    rows = load(data)
    with pytest.raises(ValueError, match=message):
        train(configured(rows, {**SMALL, "batch_size": 8, **changes}), tmp_path / "run", data=rows)
    assert not (tmp_path / "run").exists()


def test_exact_score_matching_refuses_many_dims_before_a_run_begins(tmp_path):
    x = torch.zeros(20, 121)
    rows = Images(x, torch.zeros(20).long(), x, torch.zeros(20).long(), shape=(11, 11), levels=8)
    with pytest.raises(ValueError, match=r"ExactScoreMatching .* at most 100 dims, got 121: use SlicedScoreMatching"):
        train(configured(rows, {**SMALL, "objective": "esm"}), tmp_path / "run", data=rows)
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_rows_of_the_metrics(tmp_path, no_report, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ValueError, match=r"tensorboard.* is missing: pip install .fastebm\[tensorboard\]"):
            train(tiny("dsm"), tmp_path / "run", data=images(), tensorboard=True)
    assert not (tmp_path / "run").exists()
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tiny("dsm"), tmp_path / "run", data=images(), tensorboard=True)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    found = events.Scalars("loss")
    assert [e.step for e in found] == [1, 2, 3, 4, 5, 6]
    assert [e.value for e in found] == pytest.approx([row["loss"] for row in metrics(tmp_path / "run")])


def test_options_survive_json_and_add_to_the_recipe():
    config = tiny("nce", sampler_options={"step_size": 0.1}, model_options={"dropout": 0.0})
    assert config.objective_options == {"noise_ratio": 4, "n_components": 2}
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    old = {k: v for k, v in TrainConfig().to_dict().items() if "_options" not in k and k not in ("objective", "model")}
    del old["sampler"], old["n_classes"], old["objective_learning_rate"]
    assert TrainConfig.from_dict(old) == TrainConfig()


def test_options_are_read_from_words():
    found = parsed(
        ["objective.sigma=0.3", "model.channels=8,16", "objective=dsm", "model.spectral_norm=true", "steps=5"]
    )
    assert found == {
        "objective_options": {"sigma": 0.3}, "model_options": {"channels": (8, 16), "spectral_norm": True},
        "objective": "dsm", "steps": 5,
    }  # fmt: skip
    assert parsed(["objective.noise=uniform", "sampler.mass=none"]) == {
        "objective_options": {"noise": "uniform"}, "sampler_options": {"mass": None},
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"was given objective\.sigma twice"):
        parsed(["objective.sigma=1", "objective.sigma=2"])


def test_every_default_goes_with_its_objective():
    for entry in OBJECTIVES.values():
        assert set(entry.models) <= set(MODELS)
        assert set(entry.samplers) <= set(SAMPLERS)
        assert entry.words
