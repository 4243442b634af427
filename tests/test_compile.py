"""Every kernel compiles for the GPUs that it supports, and fits in their shared memory. No GPU is needed.

Compiling a case takes seconds the first time, and nothing once it is in Triton's cache.
"""

import ast
import re
from pathlib import Path

import fastebm.kernels
import pytest
from test_resources import linux, resources

from fastebm.energies import ACTIVATIONS

pytestmark = linux

ARCHITECTURES = {2: [128, 128], 64: [128, 128], 784: [256, 128]}
ALL_ACTIVATIONS = sorted(ACTIVATIONS)
ALL_OPTIONS = {"step_size": [[0.1]] * 64, "noise_scale": [1.0], "clamp": [-1.0, 1.0], "grad_clip": 0.5}
NOISE_FIRST = {"noise_first": True, "clamp_noise": True}
# A sum of energies, with frozen coordinates, a trajectory and telemetry. all_options has bounds per dim.
SUM = {"sum": True, "recorded": True}


def all_options(dim):
    return {"clamp": [[-1.0] * dim, [1.0] * dim], "grad_clip": 0.5, "grad_norm_clip": 2.0}


def mlp(capability, dim, precision, widths=None, **options):
    widths = widths or ARCHITECTURES[dim]
    return {
        "kernel": "mlp",
        "capability": capability,
        "dim": dim,
        "widths": widths,
        "precision": precision,
        **options,
    }


def hmc(*arguments, **options):
    return {**mlp(*arguments, **options), "kernel": "hmc"}


def mala(*arguments, **options):
    return {**mlp(*arguments, **options), "kernel": "mala"}


def reduced_hmc(*arguments, **options):
    return {**mlp(*arguments, **options), "kernel": "reduced hmc"}


def hmc_options(dim):
    return {"step_size": [[0.1]] * 64, "mass": [1.0] * dim, "clamp": [[-1.0] * dim, [1.0] * dim]}


def evaluate(*arguments, **options):
    return {**mlp(*arguments, **options), "kernel": "evaluate"}


def update(capability, dim, **options):
    return {**mlp(capability, dim, "ieee", [16], **options), "kernel": "update"}


# test_resources.py compiles the shipped launches of 2 and 64 dims in its quick tests.
QUICK = [
    mlp(90, 784, "bf16"),
    mlp(80, 5, "tf32", [20, 3]),
    # every activation; a single layer; every option of the sampler
    mlp(90, 5, "bf16", [16] * len(ALL_ACTIVATIONS), activations=ALL_ACTIVATIONS),
    mlp(90, 3, "bf16", [20], rule=ALL_OPTIONS),
    update(80, 3),
    update(90, 63, rule=ALL_OPTIONS),
    update(90, 2000),
    # resident and streaming: heads and sums, with frozen coordinates, labels, a trajectory and telemetry
    mlp(80, 5, "bf16x3", [20], head="class", rule=all_options(5), **SUM),
    mlp(90, 200, "bf16", [20], head="logsumexp", rule=all_options(200), **SUM),
    update(80, 63, rule=all_options(63), recorded=True),
    update(90, 2000, rule=all_options(2000), recorded=True),
    # the noise before the gradient
    mlp(90, 3, "bf16", [20], rule={**ALL_OPTIONS, **NOISE_FIRST}),
    update(90, 63, rule={**ALL_OPTIONS, **NOISE_FIRST}),
    # both regimes, each result alone and both
    evaluate(80, 5, "bf16x3", [20], head="class", sum=True),
    evaluate(90, 200, "bf16", [20, 16], head="logsumexp", sum=True),
    evaluate(90, 63, "bf16x3", [33], wanted="value"),
    evaluate(90, 200, "bf16x3", [33], wanted="gradient"),
    # an accept test: weights of one precision and of two, and every option
    hmc(90, 5, "bf16x3", [20]),
    reduced_hmc(90, 130, "bf16x3", [20], gaussian=True, recorded=True),
    hmc(80, 63, "bf16", [20], head="class", rule=hmc_options(63), **SUM),
    mala(90, 4, "tf32", [20]),
]
SLOW = [
    *[
        case
        for capability in (80, 90)
        for dim in ARCHITECTURES
        for precision in ("bf16", "bf16x3", "tf32")
        if (case := mlp(capability, dim, precision)) not in QUICK
    ],
    mlp(90, 2, "ieee", [16]),
    mlp(80, 200, "bf16x3", [20], head="class", rule={**all_options(200), "noise_first": True}, recorded=True),
    mlp(90, 5, "bf16x3", [16] * len(ALL_ACTIVATIONS), activations=ALL_ACTIVATIONS),
    mlp(90, 200, "bf16", [20], rule=ALL_OPTIONS),
    # each head, alone and in a sum, without options and with all of them
    *[
        case
        for capability, precision in ((80, "bf16x3"), (90, "bf16"))
        for dim in (5, 200)
        for head in ("scalar", "logsumexp", "class")
        for more in ({}, {"rule": all_options(dim), **SUM})
        if (case := mlp(capability, dim, precision, [20, 16], head=head, **more)) not in QUICK
    ],
    *[mlp(capability, 784, "bf16", head="logsumexp", recorded=True) for capability in (80, 90)],
    *[
        mlp(capability, dim, precision, rule={"clamp": [-1.0, 1.0], "noise_first": True, "clamp_noise": clamp_noise})
        for capability, dim, precision, clamp_noise in ((90, 64, "bf16x3", True), (90, 784, "bf16", False))
    ],
    # streaming with slopes in two halves: all options, and rows whose size is not a multiple of 16 bytes
    mlp(90, 784, "bf16x3", rule=all_options(784), recorded=True),
    mlp(90, 783, "bf16x3", [256, 128], rule=all_options(783), recorded=True),
    *[mlp(capability, 200, "bf16x3", [64, 64], rule=all_options(200), recorded=True) for capability in (80, 90)],
    *[
        evaluate(capability, dim, precision, wanted=wanted)
        for capability in (80, 90)
        for dim in ARCHITECTURES
        for precision in ("bf16", "bf16x3", "tf32")
        for wanted in ("value", "gradient", "value_and_gradient")
    ],
    evaluate(90, 5, "bf16x3", [16] * len(ALL_ACTIVATIONS), activations=ALL_ACTIVATIONS),
    *[
        kernel(capability, dim, precision)
        for kernel in (hmc, mala)
        for capability in (80, 90)
        for dim in ARCHITECTURES
        for precision in ("bf16", "bf16x3", "tf32")
    ],
    *[
        hmc(capability, dim, precision, [20, 16], head=head, rule=hmc_options(dim), **SUM)
        for capability, precision in ((80, "bf16x3"), (90, "bf16"), (90, "bf16x3"))
        for dim in (5, 128)
        for head in ("scalar", "logsumexp", "class")
    ],
    hmc(90, 5, "bf16", [16] * len(ALL_ACTIVATIONS), activations=ALL_ACTIVATIONS),
    *[
        reduced_hmc(capability, 784, precision, widths)
        for capability in (80, 90)
        for precision in ("bf16x3", "tf32")
        for widths in ([16], [128], [64, 64], [128, 128], [16, 64, 128, 16], [32, 64, 256])
    ],
    *[
        reduced_hmc(90, 200, "bf16", [20, 16], head=head, recorded=True, **more)
        for head in ("scalar", "logsumexp", "class")
        for more in ({"rule": hmc_options(200)}, {"rule": {"step_size": [[0.1]] * 64}, "sum": True})
    ],
    *[
        case
        for capability, precision in ((80, "bf16x3"), (90, "bf16"), (90, "bf16x3"))
        for dim in (5, 128, 200)
        for head in ("scalar", "logsumexp", "class")
        if (case := evaluate(capability, dim, precision, [20, 16], head=head, sum=True)) not in QUICK
    ],
]


def name(case):
    options = "".join(f"-{key}" for key in ("activations", "rule", "sum", "gaussian", "recorded") if key in case)
    options += f"-{case['head']}" if "head" in case else ""
    options += "-bounds" if isinstance(case.get("rule", {}).get("clamp", [0])[0], list) else ""
    options += "".join(f"-{key}" for key in NOISE_FIRST if case.get("rule", {}).get(key))
    options += f"-{case['wanted']}" if "wanted" in case else ""
    options += "-norm" if "grad_norm_clip" in case.get("rule", {}) else ""
    return f"{case['kernel']}-sm_{case['capability']}-{case['dim']}-{case['widths']}-{case['precision']}{options}"


def compile_all(cases):
    return {name(case): result for case, result in zip(cases, resources.compile_all(cases), strict=True)}


@pytest.fixture(scope="session")
def quick():
    return compile_all(QUICK)


@pytest.fixture(scope="session")
def slow():
    return compile_all(SLOW)


KERNELS = {"mlp": "langevin_", "evaluate": "evaluate_", "hmc": "hmc_", "reduced hmc": "hmc_", "mala": "hmc_"}


def check(case, result):
    if result["refused"] is not None:  # correct if the reason is too little shared memory
        assert "shared memory" in result["refused"] or "W_1 is streamed" in result["refused"]
        return
    assert result["target"] == case["capability"]
    assert result["cubin_bytes"] > 0
    assert result["shared"] <= result["limit"]
    if case["kernel"] != "update":
        assert result["name"].startswith(KERNELS[case["kernel"]])
        assert result["tensor_cores"] == (case["precision"] != "ieee")
        assert result["shared"] <= result["estimate"], "launch.shared_bytes must not underestimate"


@pytest.mark.parametrize("case", QUICK, ids=name)
def test_compiles_and_fits(quick, case):
    check(case, quick[name(case)])


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=name)
def test_the_rest_compiles_and_fits(slow, case):
    check(case, slow[name(case)])


def test_all_kernels_are_compiled(quick):
    compiled = {result["name"] for result in quick.values() if result["refused"] is None}
    regimes = {f"{kernel}_{regime}" for kernel in ("langevin", "evaluate") for regime in ("resident", "streaming")}
    assert compiled == {*regimes, "langevin_update", "hmc_resident"}
    refused = [result for result in quick.values() if result["refused"] is not None]
    assert not refused


# --- inline assembly ---


def written_too_early(asm, constraints):
    """Outputs that are written before the last input is read, and are not marked with an &.

    The compiler may put such an output into the register of an input, which is then lost.
    """
    constraints = constraints.split(",")
    n_outputs = sum(c.startswith("=") for c in constraints)
    writes, last_read = {}, -1
    lines = [line for line in asm.strip().strip("{}").split(";") if line.strip() and ".reg" not in line]
    for i, line in enumerate(lines):
        _, operands = line.split(None, 1)
        target, _, _ = operands.partition("}") if operands.startswith("{") else operands.partition(",")
        for k in map(int, re.findall(r"\$(\d+)", target)):
            writes.setdefault(k, i)
        reads = [int(k) for k in re.findall(r"\$(\d+)", operands[len(target) :])]
        if any(k >= n_outputs for k in reads):
            last_read = i
    return [k for k in range(n_outputs) if writes[k] < last_read and "&" not in constraints[k]]


def inline_assembly():
    for file in sorted(Path(fastebm.kernels.__path__[0]).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "inline_asm_elementwise":
                yield pytest.param(*map(ast.literal_eval, node.args[:2]), id=f"{file.name}:{node.lineno}")


@pytest.mark.parametrize(("asm", "constraints"), list(inline_assembly()))
def test_no_output_overwrites_an_input_that_is_read_later(asm, constraints):
    assert written_too_early(asm, constraints) == []


def test_the_inline_assembly_is_found():
    assert len(list(inline_assembly())) >= 10


def test_an_output_that_is_written_too_early_is_found():
    halves = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
    assert written_too_early(halves, "=f,=f,r") == [0]
    assert written_too_early(halves, "=&f,=f,r") == []
    product = "{ .reg .b64 p; mul.wide.u32 p, $2, $3; mov.b64 {$1, $0}, p; }"
    assert written_too_early(product, "=r,=r,r,r") == []
    assert written_too_early("{ .reg .b32 t; mov.b64 {$1, $0}, $2; add.u32 t, $2, $3; }", "=r,=r,r,r") == [0, 1]
