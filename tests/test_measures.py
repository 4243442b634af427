"""fastebm evaluate: the measures of a run that its data and its energy allow, and the reasons for the others."""

import dataclasses
import json
import math

import pytest
import torch
from commands import SMALL, error
from tiny_runs import TINY, images
from torch import nn

from fastebm import ClassifierEnergy, MLPEnergy, SumEnergy
from fastebm.cli import main
from fastebm.data.sets import load
from fastebm.train import measures
from fastebm.train.measures import MEASURES, Subject, measured
from fastebm.train.models import AtLevel
from fastebm.train.recipe import TrainConfig, configured, recipe

pytestmark = pytest.mark.usefixtures("few_trees", "short_ais")


@pytest.fixture(scope="module")
def short_ais():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "_TEMPERATURES", 5)
        patch.setattr(measures, "_AIS_CHAINS", 16)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("measures") / "run"
    assert main(["train", "moons", *SMALL, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def digit_like():
    """A subject of images whose samples are the training rows, with an untrained energy."""
    data = images()
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, data=data.info, dequantisation=1.0)
    return Subject(MLPEnergy(9, (7, 5)), config, data, data.train[:25] / data.levels)


def numbers(folder_or_file):
    results = json.loads(folder_or_file.read_text())["measures"]
    return {name: {k: v for k, v in result.items() if k != "seconds"} for name, result in results.items()}


def test_the_command_measures_what_a_plane_allows(run, capsys):
    capsys.readouterr()
    assert main(["evaluate", str(run), "--device", "cpu", "--threads", "1"]) == 0
    saved = json.loads((run / "evaluation.json").read_text())
    assert saved["n_samples"] == 30  # the run's n_fresh
    assert saved["checkpoint"] == "step-00000003"
    results = saved["measures"]
    assert list(results) == list(MEASURES)
    skipped = {name for name, result in results.items() if "skipped" in result}
    assert skipped >= {"judge", "calibration", "robustness"}
    assert not skipped & {"two_sample", "mmd", "manifold", "detection", "likelihood", "quadrature", "kernel_density"}
    quadrature = results["quadrature"]
    assert quadrature["log_z"] == pytest.approx(quadrature["log_z_with_half_the_panels"], abs=1e-4)
    printed = capsys.readouterr().out
    for name, result in results.items():
        assert f"  {name}: skipped: {result['skipped']}" in printed if name in skipped else f"  {name} (" in printed
    assert "judge: skipped: it needs labelled images, and moons is a plane" in printed
    assert f"{quadrature['log_z']:.4g}" in printed


def test_named_measures_of_another_number_of_samples(run, tmp_path):
    files = [tmp_path / f"{i}.json" for i in range(3)]
    for file, seed in zip(files, (0, 0, 1), strict=True):
        options = ["--measures", "mmd", "detection", "-n", "40", "--seed", str(seed), "--out", str(file)]
        assert main(["evaluate", str(run), *options, "--device", "cpu", "--threads", "1"]) == 0
    first, again, other = map(numbers, files)
    assert list(first) == ["mmd", "detection"]
    assert json.loads(files[0].read_text())["n_samples"] == 40
    assert first == again
    assert first["mmd"] != other["mmd"]
    assert first["detection"] == other["detection"]  # of held-out rows alone


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing is not a run of fastebm"),
        (["RUN", "--measures", "mdm"], "invalid choice: 'mdm'"),
        (["RUN", "--measures", "detecton"], "did you mean detection?"),
        (["RUN", "--out", "x.csv"], "--out must end in .json, got x.csv"),
        (["RUN", "--out", "nowhere/x.json"], "there is no folder nowhere"),
        (["RUN", "-n", "0"], "must be at least 1, got 0"),
        (["RUN", "--device", "abacus"], "device must be"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, run, capsys):
    assert message in error(capsys, "evaluate", *(run if a == "RUN" else a for a in arguments))


def test_measures_of_images(digit_like):
    results = measured(digit_like, MEASURES)
    assert "it needs states in the plane, and these have 9 dims" in results["quadrature"]["skipped"]
    assert "lie on them" in results["stein"]["skipped"]  # level 0 lies on the bound
    assert "got MLPEnergy" in results["calibration"]["skipped"]
    assert results["manifold"]["space"] == "features of the judge"
    assert results["judge"]["rows"] == 20  # as many as are held out
    # Samples and training rows are the same ones here.
    assert results["mmd"]["mmd_squared"] == results["mmd"]["mmd_squared_of_train"]
    judge = results["judge"]
    assert judge["judge_frechet_distance"] == pytest.approx(judge["judge_frechet_distance_of_train"])
    assert judge["judge_accuracy"] > 0.9
    assert sum(judge["judge_class_shares"]) == pytest.approx(1.0)
    likelihood, density = results["likelihood"], results["kernel_density"]
    for nats, bits in (
        (likelihood["upper"], likelihood["bits_per_dim_lower"]),
        (likelihood["lower"], likelihood["bits_per_dim_upper"]),
        (density["mean"], density["bits_per_dim"]),
    ):
        # Of each image the log density and the log volume of its cells, and then the mean over images.
        assert bits == pytest.approx(-(nats + float(digit_like.cells[1].mean())) / (9 * math.log(2)), rel=1e-6)
    assert results["likelihood"]["n_outside"] == 0


def test_measures_of_a_classifier(digit_like):
    """A judge as the energy's classifier: right on held-out rows, and less so under an attack of larger radius."""
    classifier = ClassifierEnergy(digit_like.judge)
    results = measured(dataclasses.replace(digit_like, model=classifier), ["calibration", "robustness", "detection"])
    calibration, robustness = results["calibration"], results["robustness"]
    assert calibration["accuracy"] == digit_like.judge.accuracy(digit_like.data.test / 8, digit_like.data.test_labels)
    assert 0 <= calibration["calibration_error"] <= 1
    assert len(calibration["reliability_curve"]["accuracy"]) >= 1
    for norm in ("linf", "l2"):
        accuracies = [v for k, v in robustness.items() if k.startswith(f"accuracy_{norm}")]
        assert [calibration["accuracy"], *accuracies] == sorted([calibration["accuracy"], *accuracies], reverse=True)
    assert robustness["accuracy_l2_1"] < calibration["accuracy"]
    assert "auroc_uniform" in results["detection"]


def test_samples_drawn_by_class_are_judged_by_their_class(digit_like):
    labels = digit_like.data.train_labels[:25]
    right, wrong = (
        measured(dataclasses.replace(digit_like, labels=k), ["judge"])["judge"]["judge_accuracy_of_samples"]
        for k in (labels, 1 - labels)
    )
    assert right > 0.9
    assert right + wrong == 1.0


@pytest.mark.parametrize(
    ("arguments", "measured_at_least"),
    [
        (["moons", "--objective", "multi_dsm"], {"detection", "likelihood", "quadrature", "flow"}),
        (["digits", "--model", "conditional"], {"judge", "detection", "calibration", "robustness"}),
    ],
)
def test_runs_of_other_models(arguments, measured_at_least, tmp_path):
    """An energy of a noise level is measured at the lowest one, and classifiers as such."""
    assert main(["train", *arguments, *SMALL, "--out", str(tmp_path / "run")]) == 0
    options = ["--measures", *sorted(measured_at_least), "--device", "cpu", "--threads", "1"]
    assert main(["evaluate", str(tmp_path / "run"), *options]) == 0
    results = numbers(tmp_path / "run" / "evaluation.json")
    assert not {name for name, result in results.items() if "skipped" in result}
    assert ("judge_accuracy_of_samples" in results.get("judge", ())) == ("conditional" in arguments)


def test_a_run_of_pairs_has_nothing_to_measure(tmp_path, capsys):
    assert main(["train", "digits", "--objective", "infonce", *SMALL, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert "infonce trains energies of pairs of rows" in error(capsys, "evaluate", tmp_path / "run")


class OfNoise(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, sigma):
        return self.weight * x.square().sum(1) / sigma**2


def test_an_energy_of_a_condition_has_no_density(digit_like):
    subject = dataclasses.replace(digit_like, model=OfNoise())
    results = measured(subject, ["mmd", "stein", "detection", "likelihood", "quadrature"])
    assert "mmd_squared" in results["mmd"]
    for name in ("stein", "detection", "likelihood", "quadrature"):
        assert "the energy has a condition, sigma" in results[name]["skipped"]


class Blurred(nn.Module):
    """exp(-E(x, sigma)): N(0, 16 + sigma^2)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, sigma):
        return self.weight * x.square().sum(1) / (2 * (16 + sigma**2))


def test_the_flow_measures_the_likelihood_of_all_noise_levels():
    data = load("moons", 0)
    config = configured(data, {"objective": "multi_dsm", "objective_options": {"sigmas": (400.0, 1.0, 0.1)}})
    subject = Subject(AtLevel(Blurred(), 0.1), config, data, data.test)
    found = measured(subject, ["flow"])["flow"]
    assert found["rows"] == 500
    variance = 16 + 0.1**2
    exact = -data.test[:500].double().square().sum(1).mean() / (2 * variance) - math.log(2 * math.pi * variance)
    assert found["mean"] == pytest.approx(float(exact), abs=2e-3)
    plain = dataclasses.replace(subject, config=configured(data, {"objective": "dsm"}), model=Blurred())
    assert "an energy of states and noise levels, got mlp" in measured(plain, ["flow"])["flow"]["skipped"]


def test_samples_that_collapsed_skip_a_measure_and_not_the_rest():
    data = load("moons")
    config = TrainConfig(**{**recipe(data), "hidden_sizes": (8,)})
    bad = torch.zeros(30, 2)
    bad[0] = torch.nan
    results = measured(Subject(MLPEnergy(2, (8,)), config, data, bad), ["mmd", "stein", "detection"])
    assert "1 rows of the second set" in results["mmd"]["skipped"]
    assert "samples must be finite, and 1 rows are not" in results["stein"]["skipped"]
    assert "auroc_uniform" in results["detection"]


def test_warnings_are_kept(digit_like):
    """Five temperatures are too few for an energy with steep slopes, and log_partition says so."""
    steep = dataclasses.replace(digit_like, model=SumEnergy([digit_like.model], [1000.0]))
    results = measured(steep, ["likelihood"])
    assert any("can't be trusted" in warning for warning in results["likelihood"]["warnings"])
