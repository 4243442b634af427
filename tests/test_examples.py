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


@pytest.mark.slow
def test_inpainting(tmp_path):
    from fastebm import train
    from fastebm.recipe import TrainConfig

    pytest.importorskip("matplotlib").use("agg")
    small = {"steps": 2, "batch_size": 16, "pool_size": 32, "hidden_sizes": (16,), "n_fresh": 32, "fresh_steps": 4}
    train.train(TrainConfig(**small), tmp_path / "run")
    assert example("inpainting").main(str(tmp_path / "run")).read_bytes().startswith(b"\x89PNG")
