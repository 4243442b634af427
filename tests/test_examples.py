"""The examples run as they are."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested():
    text = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'example("{path.stem}")' in text


@pytest.mark.slow
def test_own_loop():
    """Uniform chains have a mean radius of 1.15, chains on the ring one of 1."""
    assert abs(example("own_loop").main() - 1.0) < 0.05


@pytest.mark.slow
def test_classifier_as_energy():
    assert min(example("classifier_as_energy").main()) > 0.9


def test_large_pool(capsys):
    stats = example("large_pool").main(n_chains=3_000)
    assert (stats.n_chains, stats.draws) == (3_000, 10)
    assert "resumed alike: True" in capsys.readouterr().out


def test_inpainting_names_every_row(tmp_path, monkeypatch):
    from fastebm import MLPEnergy
    from fastebm.train.recipe import TrainConfig

    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    module = example("inpainting")
    monkeypatch.setattr(module, "load_model", lambda run: (MLPEnergy(64, [4]), TrainConfig()))
    module.main(str(tmp_path))
    figure = pyplot.gcf()
    assert len(figure.axes) == 6 * 8
    names = [" ".join(axes.get_ylabel().split()) for axes in figure.axes[::8]]
    assert names == ["original", "start: lower half is noise", *(f"after {n} steps" for n in (50, 100, 150, 200))]
    left = min(axes.get_tightbbox().x0 for axes in figure.axes)
    assert left >= 0  # no name is cut
    pyplot.close(figure)


@pytest.mark.slow
def test_inpainting(tmp_path):
    from fastebm.train import loop as train
    from fastebm.train.recipe import TrainConfig

    pytest.importorskip("matplotlib").use("agg")
    small = {"steps": 2, "batch_size": 16, "pool_size": 32, "hidden_sizes": (16,), "n_fresh": 32, "fresh_steps": 4}
    train.train(TrainConfig(**small), tmp_path / "run")
    assert example("inpainting").main(str(tmp_path / "run")).read_bytes().startswith(b"\x89PNG")
