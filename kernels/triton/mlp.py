"""The layers of an MLP: energy and gradient.

Any depth without generated source: `slope_at` calls itself for the layer above, so the return path is the
backpropagation. The layers of all networks of a sum are numbered through.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .activations import activation_and_slope, slope_times
from .parking import activate_and_park, fetch, settled
from .products import load_weight, multiply, operand, product, transpose


class Layers(NamedTuple):
    """The layers of all networks, passed as a constexpr.

    FIRSTS: network k has layers FIRSTS[k] up to FIRSTS[k + 1], of which the last is its head.
    BLOCKS, ACTIVATIONS, PARAMETERS: of each layer, the padded width, the activation or the head ("scalar", "class",
    "logsumexp"), and the activation's parameter.
    FAST: approximate special functions.
    TARGET: "interpreter", "wgmma" (sm_90 where registers are short) or "gpu", for the few lines that differ.
    """

    FIRSTS: tuple[int, ...]
    BLOCKS: tuple[int, ...]
    ACTIVATIONS: tuple[str, ...]
    PARAMETERS: tuple[float, ...]
    PRECISION: str
    FAST: bool
    TARGET: str


class Terms(NamedTuple):
    """Pointers to the rows of the energy's terms c (x - m)^2 / 2 + b x; empty for a term that is absent."""

    quadratic: tuple[tl.tensor, ...]  # of c and m
    linear: tuple[tl.tensor, ...]  # of b


class Sum(NamedTuple):
    """E in memory while its terms are added up. There a sum is done when it is stored, and takes no registers."""

    ptrs: tl.tensor  # (BLOCK_CHAINS,) of float32
    inside: tl.tensor  # (BLOCK_CHAINS,) bool: which chains exist


@triton.jit
def add_to(energy, value):
    """value: (BLOCK_CHAINS,)."""
    tl.store(energy.ptrs, tl.load(energy.ptrs, mask=energy.inside) + value, mask=energy.inside)


@triton.jit
def load_row(ptr, shift, BLOCK: tl.constexpr):
    """A bias or the head's weight, padded by `weights.prepare`: (1, BLOCK). shift: always 0, see resident.py."""
    return tl.load(ptr + shift + tl.arange(0, BLOCK))[None, :]


@triton.jit
def load_bias(ptrs, shift, LAYER: tl.constexpr, LAYERS: tl.constexpr):
    return load_row(ptrs[LAYER], shift, LAYERS.BLOCKS[LAYER])


@triton.jit
def load_weights(ptrs, LAYERS: tl.constexpr, BLOCK_DIM: tl.constexpr, BOTH_ORDERS: tl.constexpr):
    """Every layer's weight as `load_weight` gives it.

    Left as pointers: a scalar or class head, which is no product, and, with BLOCK_DIM = 0, the first layers.
    """
    weights = ()
    for k in tl.static_range(len(LAYERS.FIRSTS) - 1):
        for layer in tl.static_range(tl.constexpr(LAYERS.FIRSTS[k]), tl.constexpr(LAYERS.FIRSTS[k + 1])):
            # tl.constexpr: triton 3.6 takes an entry of a constexpr tuple for a run-time value
            if layer == tl.constexpr(LAYERS.FIRSTS[k]):
                if BLOCK_DIM > 0:
                    w = load_weight(
                        ptrs[layer], 0, BLOCK_DIM, BLOCK_DIM, LAYERS.BLOCKS[layer], LAYERS, BOTH_ORDERS
                    )  # fmt: skip
                else:
                    w = ptrs[layer]
            elif (
                tl.constexpr(LAYERS.ACTIVATIONS[layer]) == "scalar"
                or tl.constexpr(LAYERS.ACTIVATIONS[layer]) == "class"
            ):
                w = ptrs[layer]
            else:
                w = load_weight(
                    ptrs[layer], 0, LAYERS.BLOCKS[layer - 1], LAYERS.BLOCKS[layer - 1], LAYERS.BLOCKS[layer],
                    LAYERS, BOTH_ORDERS,
                )  # fmt: skip
            weights = weights + (w,)
    return weights


@triton.jit
def load_head(ptr, labels, shift, BLOCK: tl.constexpr, HEAD: tl.constexpr):
    """The head's weight: one row for all chains, (1, BLOCK), or that of each chain's label, (BLOCK_CHAINS, BLOCK)."""
    if HEAD == "class":
        return tl.load(ptr + shift + labels[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :])
    else:
        return load_row(ptr, shift, BLOCK)


@triton.jit
def energy_of_head(a, head, bias_ptrs, labels, LAYER: tl.constexpr, LAYERS: tl.constexpr):
    """E: (BLOCK_CHAINS,), of the "scalar" or "class" head LAYER, given its weight and the activations below."""
    value = tl.sum(a * head, axis=1)
    if tl.constexpr(LAYERS.ACTIVATIONS[LAYER]) == "class":
        return value + tl.load(bias_ptrs[LAYER] + labels)
    else:
        return value + tl.load(bias_ptrs[LAYER])


@triton.jit
def energy_of_classes(scale_ptr, top, total):
    """E: (BLOCK_CHAINS,), of a "logsumexp" head. total: the sum of exp(f - top) over the classes."""
    return tl.load(scale_ptr) * (top + tl.log(total))


@triton.jit
def slope_at(
    z, weights, bias_ptrs, scale_ptr, labels, shift, parking_ptr, LAYER: tl.constexpr, LAYERS: tl.constexpr,
    energy=None,
):  # fmt: skip
    """dE/dz at hidden layer LAYER: (BLOCK_CHAINS, BLOCKS[LAYER]), given its z.

    weights[l] and bias_ptrs[l] belong to layer l. scale_ptr: of a "logsumexp" head. parking_ptr: room in memory for
    act'(z), in bf16 or float32, while the layers above are computed; None keeps it in registers. energy: the `Sum` to
    which E is added, or None.
    """
    ABOVE: tl.constexpr = tl.constexpr(LAYERS.ACTIVATIONS[LAYER + 1])
    if ABOVE == "scalar" or ABOVE == "class":
        head = load_head(weights[LAYER + 1][0], labels, shift, LAYERS.BLOCKS[LAYER], ABOVE)
        if energy is not None:
            a, _ = activation_and_slope(z, LAYER, LAYERS)
            add_to(energy, energy_of_head(a, head, bias_ptrs, labels, LAYER + 1, LAYERS))
        return slope_times(z, head, LAYER, LAYERS)
    else:
        if parking_ptr is not None:
            a = activate_and_park(z, parking_ptr, LAYER, LAYERS)
        else:
            a, slope = activation_and_slope(z, LAYER, LAYERS)
            slope = settled(slope, LAYERS)
            a = operand(a, LAYERS)
        above = multiply(a, weights[LAYER + 1], LAYERS)
        above += load_bias(bias_ptrs, shift, LAYER + 1, LAYERS)
        if ABOVE == "logsumexp":
            top = tl.max(above, axis=1)
            share = tl.exp(above - top[:, None])
            total = tl.sum(share, axis=1)
            grad = share * (tl.load(scale_ptr) / total)[:, None]
            if energy is not None:
                add_to(energy, energy_of_classes(scale_ptr, top, total))
        else:
            grad = slope_at(above, weights, bias_ptrs, scale_ptr, labels, shift, None, LAYER + 1, LAYERS, energy)
        back = product(grad, transpose(weights[LAYER + 1], LAYERS), LAYERS)
        if parking_ptr is not None:
            slope = fetch(parking_ptr, z.shape[0], z.shape[1], LAYERS)
        return slope * back


@triton.jit
def gradient_of(x, weights, bias_ptrs, scale_ptr, labels, shift, FIRST: tl.constexpr, LAYERS: tl.constexpr):
    """dE_k/dx of the network whose first layer is FIRST: (BLOCK_CHAINS, BLOCK_DIM)."""
    z = product(x, weights[FIRST], LAYERS) + load_bias(bias_ptrs, shift, FIRST, LAYERS)
    slope = slope_at(z, weights, bias_ptrs, scale_ptr, labels, shift, None, FIRST, LAYERS)
    return product(slope, transpose(weights[FIRST], LAYERS), LAYERS)


@triton.jit
def energy_at(z, weights, bias_ptrs, scale_ptr, labels, shift, LAYER: tl.constexpr, LAYERS: tl.constexpr):
    """E: (BLOCK_CHAINS,), given z at hidden layer LAYER."""
    a, _ = activation_and_slope(z, LAYER, LAYERS)
    ABOVE: tl.constexpr = tl.constexpr(LAYERS.ACTIVATIONS[LAYER + 1])
    if ABOVE == "scalar" or ABOVE == "class":
        head = load_head(weights[LAYER + 1][0], labels, shift, LAYERS.BLOCKS[LAYER], ABOVE)
        return energy_of_head(a, head, bias_ptrs, labels, LAYER + 1, LAYERS)
    else:
        above = product(a, weights[LAYER + 1], LAYERS)
        above += load_bias(bias_ptrs, shift, LAYER + 1, LAYERS)
        if ABOVE == "logsumexp":
            top = tl.max(above, axis=1)
            return energy_of_classes(scale_ptr, top, tl.sum(tl.exp(above - top[:, None]), axis=1))
        else:
            return energy_at(above, weights, bias_ptrs, scale_ptr, labels, shift, LAYER + 1, LAYERS)


@triton.jit
def add_terms(grad, x, terms, at, BLOCK: tl.constexpr):
    """grad + c (x - m) + b, for the dims from ``at`` on."""
    if len(terms.quadratic) > 0:
        grad += load_row(terms.quadratic[0], at, BLOCK) * (x - load_row(terms.quadratic[1], at, BLOCK))
    if len(terms.linear) > 0:
        grad += load_row(terms.linear[0], at, BLOCK)
    return grad


@triton.jit
def energy_of_terms(x, terms, at, BLOCK: tl.constexpr):
    """(BLOCK_CHAINS,): sum of c (x - m)^2 / 2 + b x over the dims from ``at`` on."""
    value = tl.sum(x * 0.0, axis=1)
    if len(terms.quadratic) > 0:
        away = x - load_row(terms.quadratic[1], at, BLOCK)
        value += 0.5 * tl.sum(load_row(terms.quadratic[0], at, BLOCK) * away * away, axis=1)
    if len(terms.linear) > 0:
        value += tl.sum(load_row(terms.linear[0], at, BLOCK) * x, axis=1)
    return value
