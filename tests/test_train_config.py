"""The configuration of a run: its entries are checked, survive JSON, and say how to sample and learn."""

import dataclasses
import json

import pytest
from tiny_runs import TINY

from fastebm.data.sets import load
from fastebm.train.recipe import TrainConfig
from fastebm.train.samplers import build_sampler
from fastebm.train.trainer import learning_rate_factor

pytestmark = pytest.mark.usefixtures("few_trees")


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
        ({"reinit_prob": 1.5}, r"reinit_prob must be a number in \[0, 1\]"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"decay": "step"}, "decay must be"),
        ({"clamp": (1.0, 0.0)}, "clamp needs lo < hi"),
        ({"grad_clip": 0.0}, "grad_clip must be"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be"),
        ({"dequantisation": 0.5, "data": load("moons").info}, "dequantisation is for images: it must be 0, got 0.5"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be"),
    ],
)
def test_config_refuses_impossible_values(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_learning_rate_goes_from_its_value_to_zero():
    for decay, middle in (("cosine", 0.5), ("linear", 0.5), ("none", 1.0)):
        assert learning_rate_factor(0, 6, 0, decay) == 1.0
        assert learning_rate_factor(3, 6, 0, decay) == pytest.approx(middle)
        assert learning_rate_factor(6, 6, 0, decay) == pytest.approx(1.0 if decay == "none" else 0.0)


def test_noise_cools_over_the_last_part_of_every_block():
    config = dataclasses.replace(TINY, noise_std=0.02, drift=0.5, langevin_steps=5, cooling=0.8)
    block = [0.02, 0.015, 0.01, 0.005, 0.0]
    assert build_sampler(config, 10).noise_scale.tolist() == pytest.approx(block * 2)
    assert build_sampler(config, 7).noise_scale.tolist() == pytest.approx(block[-2:] + block)
    assert build_sampler(config, 7).step_size == 1.0
    assert build_sampler(dataclasses.replace(config, cooling=0.0), 3).noise_scale.tolist() == pytest.approx([0.02] * 3)


def test_learning_rate_warms_up():
    factors = [learning_rate_factor(done, 6, warmup_steps=4, decay="none") for done in range(5)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
