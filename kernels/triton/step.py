"""Parts of a step that kernels share. `updated` is the update of Langevin dynamics itself.

An option that is None takes no code: passing None removes it at compile time.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .philox import normals
from .tiles import load_tile, store_tile, zero_padding
from .weights import REPORT


class Coefficient(NamedTuple):
    """The drift or the noise's standard deviation: a number and no strides, or a pointer."""

    value: tl.tensor
    stride_chain: tl.tensor
    stride_step: tl.tensor


class Counters(NamedTuple):
    """Philox's key (`load_key`), and the counters of each chain (`load_counters`)."""

    key0: tl.tensor
    key1: tl.tensor
    chain: tl.tensor
    step: tl.tensor


class Frozen(NamedTuple):
    """uint8, 1 where a coordinate stays; ptr is None where none does. stride: 0 where all chains share a row."""

    ptr: tl.tensor
    stride: tl.tensor


class Bounds(NamedTuple):
    """Two numbers, or two pointers to one bound per dim."""

    lo: tl.tensor
    hi: tl.tensor


# -- inputs of a step ------------------------------------------------------------------------------------------


@triton.jit
def load_coefficient(coefficient, tile, t, PER_CHAIN: tl.constexpr):
    """The coefficient of step t: a number, or (BLOCK_CHAINS, 1) when each chain has its own."""
    if PER_CHAIN:
        at = tile.chains * coefficient.stride_chain + t * coefficient.stride_step
        return tl.load(coefficient.value + at, mask=tile.inside, other=0.0)[:, None]
    elif coefficient.stride_step is not None:
        return tl.load(coefficient.value + t * coefficient.stride_step)
    else:
        return tl.cast(coefficient.value, tl.float32)


@triton.jit
def load_key(seed_ptr, shift=0):
    """shift: always 0, but opaque to the compiler: stops it keeping the keys of ten rounds in 18 registers."""
    seed = tl.load(seed_ptr + shift)
    return seed.to(tl.uint32), (seed >> 32).to(tl.uint32)


@triton.jit
def load_counters(chain_ptr, step_ptr, tile, t):
    """Global number and lifetime step of every chain at step t."""
    chain = tl.load(chain_ptr + tile.chains, mask=tile.inside, other=0)
    step = tl.load(step_ptr + tile.chains, mask=tile.inside, other=0) + t
    return chain, step.to(tl.uint32)


@triton.jit
def load_labels(label_ptr, tile):
    if label_ptr is not None:
        return tl.load(label_ptr + tile.chains + tile.shift, mask=tile.inside, other=0)
    else:
        return tl.zeros_like(tile.chains)  # never read


# -- the update ------------------------------------------------------------------------------------------------


@triton.jit
def noise_of(counters, noise_std, tile, SHAPE: tl.constexpr, FAST: tl.constexpr):
    """noise_std xi of a tile's dims."""
    return normals(
        counters.key0, counters.key1, counters.chain, counters.step, tile.c * (SHAPE.BLOCK_DIM // 4), 0, SHAPE.DIM,
        SHAPE.BLOCK_CHAINS, SHAPE.BLOCK_DIM, FAST, SHAPE.ORDER != "plain", noise_std,
    )  # fmt: skip


@triton.jit
def hold(moved, x, frozen, tile, SHAPE: tl.constexpr):
    """moved, with frozen coordinates at x."""
    if frozen.ptr is not None:
        stays = load_tile(frozen.ptr + tile.shift, frozen.stride, tile, SHAPE)
        return tl.where(stays != 0, x, moved)
    else:
        return moved


@triton.jit
def clipped_by_value(grad, grad_clip):
    """Written with comparisons, not min and max, so that NaN stays NaN."""
    if grad_clip is not None:
        return tl.where(grad > grad_clip, grad_clip, tl.where(grad < -grad_clip, -grad_clip, grad))
    else:
        return grad


@triton.jit
def shrinkage(square_norm, norm_clip):
    """(BLOCK_CHAINS, 1): the factor that makes each chain's gradient no longer than norm_clip."""
    norm = tl.sqrt(square_norm)
    return (norm_clip / tl.where(norm > norm_clip, norm, norm_clip))[:, None]  # of a NaN, 1: the gradient stays NaN


@triton.jit
def clip(grad, grad_clip, shrink):
    """grad_clip: a bound on each element, or None. shrink: see `shrinkage`; or None."""
    clipped = clipped_by_value(grad, grad_clip)
    if shrink is not None:
        clipped *= shrink
    return clipped


@triton.jit
def load_row_of_dims(ptr, tile, SHAPE: tl.constexpr):
    """One number per dim, (DIM,) in memory, for the columns of a tile: (1, BLOCK_DIM); 0 in padding."""
    return tl.load(ptr + tile.shift + tile.dims, mask=tile.dims < SHAPE.DIM, other=0.0)[None, :]


@triton.jit
def load_bounds(bounds, tile, SHAPE: tl.constexpr, CLAMP: tl.constexpr):
    """Two numbers, or two rows (1, BLOCK_DIM)."""
    if CLAMP == "rows":
        return load_row_of_dims(bounds.lo, tile, SHAPE), load_row_of_dims(bounds.hi, tile, SHAPE)
    else:
        return bounds.lo, bounds.hi


@triton.jit
def clamp(x, bounds, tile, SHAPE: tl.constexpr, CLAMP: tl.constexpr):
    """CLAMP: "" for none, "numbers", or "rows" for a bound per dim."""
    # min and max may swallow NaN: only states that were found finite are kept
    if CLAMP != "":
        low, high = load_bounds(bounds, tile, SHAPE, CLAMP)
        return tl.minimum(tl.maximum(x, low), high)
    else:
        return x


@triton.jit
def within(x, bounds, frozen, tile, SHAPE: tl.constexpr, CLAMP: tl.constexpr):
    """(BLOCK_CHAINS,) bool: whether all coordinates that are not frozen lie within the bounds. NaN is outside."""
    if CLAMP != "":
        low, high = load_bounds(bounds, tile, SHAPE, CLAMP)
        fits = (x >= low) & (x <= high)
        fits = hold(fits | (tile.dims >= SHAPE.DIM)[None, :], True, frozen, tile, SHAPE)
        return tl.min(fits.to(tl.int32), axis=1) > 0
    else:
        return tl.full((SHAPE.BLOCK_CHAINS,), 1, tl.int1)


@triton.jit
def is_finite(x):
    """(BLOCK_CHAINS,) bool: 0 * x is 0 for finite x, else NaN, and a sum carries NaN."""
    return tl.sum(x * 0.0, axis=1) == 0.0


@triton.jit
def updated(
    x, clipped, noise, drift, frozen, bounds, tile, SHAPE: tl.constexpr, CLAMP: tl.constexpr, HALF: tl.constexpr,
    ZERO_PADDING: tl.constexpr,
):  # fmt: skip
    """x - drift clipped + noise, frozen coordinates held: before the clamp, whether it is finite there, and clamped.

    HALF: "noise" or "drift" for that half of a step alone; "" for both. If not ZERO_PADDING, padded columns hold noise
    of no dim.
    """
    if HALF == "noise":
        moved = x + noise
    elif HALF == "drift":
        moved = x - drift * clipped
    else:
        moved = x - drift * clipped + noise
    moved = hold(moved, x, frozen, tile, SHAPE)
    if ZERO_PADDING:
        # Padded columns hold noise of no dim and, where dE/dz is infinite, 0 * inf: neither may stop a chain.
        moved = zero_padding(moved, tile, SHAPE)
    finite = is_finite(moved)  # before the clamp, which would hide it
    new = clamp(moved, bounds, tile, SHAPE, CLAMP)
    if CLAMP != "":
        new = hold(new, x, frozen, tile, SHAPE)
    return moved, finite, new


@triton.jit
def stopped_at(first_bad, finite, t):
    """first_bad, with t for chains that were finite so far."""
    return tl.where((first_bad < 0) & ~finite, t, first_bad)


# -- outputs of a step -----------------------------------------------------------------------------------------


@triton.jit
def differs(x, y, tile, SHAPE: tl.constexpr):
    """(BLOCK_CHAINS,) int32: 1 where any coordinate does."""
    return tl.max(((x != y) & (tile.dims < SHAPE.DIM)[None, :]).to(tl.int32), axis=1)


@triton.jit
def store_trajectory(ptr, x, t, thin, steps, tile, SHAPE: tl.constexpr):
    """These dims of every thin-th state, in (n_chains, steps // thin, DIM)."""
    if ptr is not None:
        if (t + 1) % thin == 0:
            row_ptr = ptr + (t // thin).to(tl.int64) * SHAPE.DIM
            store_tile(row_ptr, (steps // thin).to(tl.int64) * SHAPE.DIM, x, tile, SHAPE)


@triton.jit
def store_telemetry(ptr, tile, square_norm, first_sum, second_sum, steps):
    """Rows of a (3, n_chains) table: the gradient's norm, and the means over the steps of what two sums are of.

    For Langevin these are whether a step was clipped, and whether it was clamped.
    """
    share = 1.0 / tl.maximum(steps, 1).to(tl.float32)
    at = tile.n_chains.to(tl.int64) + tile.chains
    tl.store(ptr + tile.chains, tl.sqrt(square_norm), mask=tile.inside)
    tl.store(ptr + at, first_sum.to(tl.float32) * share, mask=tile.inside)
    tl.store(ptr + tile.n_chains.to(tl.int64) + at, second_sum.to(tl.float32) * share, mask=tile.inside)


@triton.jit
def report_bad(prepared_ptr, first_bad, energy, inside):
    """Tell the host, which then looks at every chain, whether any is not finite."""
    bad = inside & ((first_bad >= 0) | (energy * 0.0 != 0.0))
    if tl.max(bad.to(tl.int32), axis=0) > 0:
        tl.store(prepared_ptr + REPORT, 1)
