"""Philox4x32-10 and Box-Muller: the noise stream of fastebm/rng.py, counter for counter."""

import triton
import triton.language as tl

from .tiles import lane_order, to_lanes


@triton.jit
def wide_product(c, factor, FAST: tl.constexpr):
    """High and low word of a 64-bit product: one IMAD.WIDE, where umulhi and a product would be two instructions."""
    if FAST:
        return tl.inline_asm_elementwise(
            "{ .reg .b64 p; mul.wide.u32 p, $2, $3; mov.b64 {$1, $0}, p; }", "=r,=r,r,r",
            [c, factor], (tl.uint32, tl.uint32), True, 1,
        )  # fmt: skip
    else:
        p = c.to(tl.uint64) * factor
        return (p >> 32).to(tl.uint32), p.to(tl.uint32)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1, ROUNDS: tl.constexpr = 10, FAST: tl.constexpr = False):
    """Four random uint32 words for each counter; all arguments are uint32 and broadcast together."""
    for _ in tl.static_range(ROUNDS):
        hi0, lo0 = wide_product(c0, 0xD2511F53, FAST)
        hi1, lo1 = wide_product(c2, 0xCD9E8D57, FAST)
        c0 = hi1 ^ c1 ^ k0
        c2 = hi0 ^ c3 ^ k1
        c1 = lo1
        c3 = lo0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def unit(w):
    """u(w) = (w + 0.5) 2^-32 in float32, written so that it is one fused multiply-add; scaling by 2^-32 is exact."""
    return w.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def box_muller(w0, w1, scale, FAST: tl.constexpr):
    """Two standard normals times scale: r (cos t, sin t), r = scale sqrt(-2 ln u(w0)), t = 2 pi u(w1).

    FAST uses the special-function unit through inline assembly: tl.cos and tl.sin carry a slow path for large
    arguments, and tl.log a long polynomial, which together make the whole draw four times as long.
    """
    u = unit(w0)
    if FAST:
        # 2 pi u(w1) in one fused multiply-add
        angle = w1.to(tl.float32) * 1.4629180792671596e-09 + 7.314590396335798e-10
        log2 = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [u], tl.float32, True, 1)
        # abs: the approximation may round log2(u) above 0 near u = 1
        root = tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [tl.abs(log2)], tl.float32, True, 1)
        radius = root * (scale * 1.1774100225154747)  # sqrt(2 ln 2)
        cos = tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
        sin = tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
    else:
        angle = unit(w1) * 6.283185307179586
        radius = scale * tl.sqrt(-2.0 * tl.log(u))
        cos = tl.cos(angle)
        sin = tl.sin(angle)
    return radius * cos, radius * sin


@triton.jit
def normals(
    key0,
    key1,
    chain,
    step,
    first_block,
    STREAM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_CHAINS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    FAST: tl.constexpr,
    LANES: tl.constexpr = False,
    scale=1.0,
):
    """(BLOCK_CHAINS, BLOCK_DIM) standard normals of dims 4 first_block .. 4 first_block + BLOCK_DIM - 1, times scale.

    chain: (BLOCK_CHAINS,) int64 global numbers; step: (BLOCK_CHAINS,) uint32 lifetime steps. scale: a number or
    (BLOCK_CHAINS, 1); applied here it costs half an instruction per normal, afterwards one. LANES: columns in
    lane_order.
    """
    c0 = chain.to(tl.uint32)[:, None]
    c1 = (chain >> 32).to(tl.uint32)[:, None]
    c2 = step[:, None]
    if DIM <= 4:
        # One draw per chain serves all its dims; columns past DIM hold copies that nobody reads.
        c3 = tl.full((1, 1), STREAM << 24, tl.uint32)
        w0, w1, w2, w3 = philox4x32(c0, c1, c2, c3, key0, key1, FAST=FAST)
        n0, n1 = box_muller(w0, w1, scale, FAST)
        column = tl.arange(0, BLOCK_DIM)[None, :]
        if LANES:
            column = lane_order(column)
        if DIM <= 2:
            return tl.where(column == 0, n0, n1)
        else:
            n2, n3 = box_muller(w2, w3, scale, FAST)
            return tl.where(column < 2, tl.where(column == 0, n0, n1), tl.where(column == 2, n2, n3))
    else:
        block = first_block + tl.arange(0, BLOCK_DIM // 4)
        c3 = (block.to(tl.uint32) | (STREAM << 24))[None, :]
        w0, w1, w2, w3 = philox4x32(c0, c1, c2, c3, key0, key1, FAST=FAST)
        n0, n1 = box_muller(w0, w1, scale, FAST)
        n2, n3 = box_muller(w2, w3, scale, FAST)
        # [block, i, j] -> 4 block + 2 i + j: four words to four neighbouring dims
        quads = tl.join(tl.join(n0, n2), tl.join(n1, n3))
        noise = tl.reshape(quads, (BLOCK_CHAINS, BLOCK_DIM))
        if LANES:
            noise = to_lanes(noise)
        return noise


@triton.jit
def uniforms(key0, key1, chain, step, STREAM: tl.constexpr, FAST: tl.constexpr):
    """(BLOCK_CHAINS,): one number in (0, 1] per chain, the first of its block 0. Arguments as for `normals`."""
    c3 = tl.full(chain.shape, STREAM << 24, tl.uint32)
    w, _, _, _ = philox4x32(chain.to(tl.uint32), (chain >> 32).to(tl.uint32), step, c3, key0, key1, FAST=FAST)
    return unit(w)
