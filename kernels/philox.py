"""Philox4x32-10 and Box-Muller on the device: the twin of fastebm/noise.py, counter for counter."""

import triton
import triton.language as tl


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1, ROUNDS: tl.constexpr = 10):
    """Four random uint32 words for each counter; all arguments are uint32 and broadcast together."""
    for _ in tl.static_range(ROUNDS):
        # A 64-bit product is one IMAD.WIDE; umulhi and a product would be two instructions.
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def unit(w):
    """u(w) = (w + 0.5) 2^-32 in float32, written so that it is one fused multiply-add; scaling by 2^-32 is exact."""
    return w.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10


@triton.jit
def box_muller(w0, w1, FAST: tl.constexpr):
    """Two standard normals r (cos t, sin t), r = sqrt(-2 ln u(w0)), t = 2 pi u(w1).

    FAST uses the special-function unit through inline assembly: tl.cos and tl.sin carry a slow path for
    large arguments, and tl.log a long polynomial, that four times the instructions of the whole draw.
    """
    u = unit(w0)
    if FAST:
        # 2 pi u(w1) in one fused multiply-add
        angle = w1.to(tl.float32) * 1.4629180792671596e-09 + 7.314590396335798e-10
        log2 = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [u], tl.float32, True, 1)
        # -2 ln 2 log2(u); the approximation may round log2(u) above 0 near u = 1
        square = tl.maximum(log2 * -1.3862943611198906, 0.0)
        radius = tl.inline_asm_elementwise("sqrt.approx.ftz.f32 $0, $1;", "=f,f", [square], tl.float32, True, 1)
        cos = tl.inline_asm_elementwise("cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
        sin = tl.inline_asm_elementwise("sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], tl.float32, True, 1)
    else:
        angle = unit(w1) * 6.283185307179586
        radius = tl.sqrt(-2.0 * tl.log(u))
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
):
    """(BLOCK_CHAINS, BLOCK_DIM) standard normals of dims 4 first_block .. 4 first_block + BLOCK_DIM - 1.

    chain: (BLOCK_CHAINS,) int64 global numbers; step: (BLOCK_CHAINS,) uint32 lifetime steps.
    """
    c0 = chain.to(tl.uint32)[:, None]
    c1 = (chain >> 32).to(tl.uint32)[:, None]
    c2 = step[:, None]
    if DIM <= 4:
        # One draw a chain serves all its dims; columns past DIM hold copies that nobody reads.
        c3 = tl.full((1, 1), STREAM << 24, tl.uint32)
        w0, w1, w2, w3 = philox4x32(c0, c1, c2, c3, key0, key1)
        n0, n1 = box_muller(w0, w1, FAST)
        column = tl.arange(0, BLOCK_DIM)[None, :]
        if DIM <= 2:
            return tl.where(column == 0, n0, n1)
        else:
            n2, n3 = box_muller(w2, w3, FAST)
            return tl.where(column < 2, tl.where(column == 0, n0, n1), tl.where(column == 2, n2, n3))
    else:
        block = first_block + tl.arange(0, BLOCK_DIM // 4)
        c3 = (block.to(tl.uint32) | (STREAM << 24))[None, :]
        w0, w1, w2, w3 = philox4x32(c0, c1, c2, c3, key0, key1)
        n0, n1 = box_muller(w0, w1, FAST)
        n2, n3 = box_muller(w2, w3, FAST)
        # [block, i, j] -> 4 block + 2 i + j: four words to four neighbouring dims
        quads = tl.join(tl.join(n0, n2), tl.join(n1, n3))
        return tl.reshape(quads, (BLOCK_CHAINS, BLOCK_DIM))
