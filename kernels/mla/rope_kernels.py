"""RoPE, down-projection norms and the absorbed key up-projection of MLA in Triton, forward and backward.

    turn_kernel         queries without up: copies nope, turns rope; one program is one token and up to 64 heads
    absorb_kernel       queries with up: q_nope · up[h] on the tensor cores; one program is 64 or 128 tokens, 4 heads
    up_gradient_kernel  d_up[h] = q_nopeᵀ d_out: one program is a tile of up and a split of the tokens
    latents_kernel      both norms and the key's rope; one program is a tile of tokens, whole rows
    latents_gradient_kernel

The backward of a turn is the turn by −angle with input and output exchanged, so the first two kernels serve it too.
Bound: memory; every element is read and written once, but for up, which the caches serve, and d_out, which d_up reads
once more. A row is loaded whole and its pairs are split in registers. Weights' gradients are fp32 partial sums, one a
program, that are then added in one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

COUNTS = ("S", "H", "P", "tiles", "total", "run", "programs")  # arguments whose values no code depends on


@triton.jit
def angles(cos, sin, positions, token, inside, P, PAIRS: tl.constexpr, HALF: tl.constexpr):
    """cos and sin [T, HALF] of tokens [T]; NaN for a position outside the tables."""
    if positions is None:
        place = token
    else:
        place = tl.load(positions + token, mask=inside, other=0)
    pair = tl.arange(0, HALF)[None, :]
    here = (inside & (place >= 0) & (place < P))[:, None] & (pair < PAIRS)
    at = place.to(tl.int64)[:, None] * PAIRS + pair
    return tl.load(cos + at, mask=here, other=float("nan")), tl.load(sin + at, mask=here, other=float("nan"))


@triton.jit
def turn(
    x, out, inside, cos, sin,
    PAIRS: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Turn PAIRS pairs at x [R, 1] by cos, sin [R or 1, HALF] and store them at out [R, 1]; inside [R, 1] masks rows.

    Pairs are halves of the output, and of the input unless INTERLEAVED; with BACK input and output change places.
    """
    pair = tl.arange(0, HALF)[None, :]
    column = tl.arange(0, 2 * HALF)[None, :]
    half = inside & (pair < PAIRS)
    whole = inside & (column < 2 * PAIRS)
    if INTERLEAVED and not BACK:
        both = tl.load(x + column, mask=whole, other=0.0)
        first, second = tl.split(tl.reshape(both, [both.shape[0], HALF, 2]))
    else:
        first = tl.load(x + pair, mask=half, other=0.0)
        second = tl.load(x + PAIRS + pair, mask=half, other=0.0)
    first, second = first.to(tl.float32), second.to(tl.float32)
    if BACK:
        sin = -sin
    left = (first * cos - second * sin).to(out.dtype.element_ty)
    right = (second * cos + first * sin).to(out.dtype.element_ty)
    if INTERLEAVED and BACK:
        joined = tl.join(left, right)
        tl.store(out + column, tl.reshape(joined, [joined.shape[0], 2 * HALF]), mask=whole)
    else:
        tl.store(out + pair, left, mask=half)
        tl.store(out + PAIRS + pair, right, mask=half)


@triton.jit(do_not_specialize=COUNTS)
def turn_kernel(
    x, out, cos, sin, positions,
    x_at, out_at,  # strides
    S, H, P, NOPE: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, BACK: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """x, out [B, S, H, NOPE + 2 PAIRS]."""
    row, token = tl.program_id(0) // S, tl.program_id(0) % S
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    inside = head < H
    x += row.to(tl.int64) * x_at[0] + token.to(tl.int64) * x_at[1] + head.to(tl.int64) * x_at[2]
    out += row.to(tl.int64) * out_at[0] + token.to(tl.int64) * out_at[1] + head.to(tl.int64) * out_at[2]
    token += tl.arange(0, 1)
    c, s = angles(cos, sin, positions, token, token < S, P, PAIRS, HALF)
    if NOPE:
        column = tl.arange(0, BLOCK_N)[None, :]
        here = inside & (column < NOPE)
        tl.store(out + column, tl.load(x + column, mask=here), mask=here)
    turn(x + NOPE, out + NOPE, inside, c, s, PAIRS, HALF, INTERLEAVED, BACK)


@triton.jit(do_not_specialize=COUNTS)
def absorb_kernel(
    x, up, out, cos, sin, positions,
    x_at, up_at, out_at,  # strides; up's are [H, K, N]
    S, H, P, tiles, K: tl.constexpr, N: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BACK: tl.constexpr, HEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """x [B, S, H, K + 2 PAIRS] to out [B, S, H, N + 2 PAIRS]; forward K is Dn and N is L, backward the reverse."""
    groups = tl.cdiv(H, HEADS)
    group, tile = tl.program_id(0) % groups, tl.program_id(0) // groups
    row, tile = tile // tiles, tile % tiles
    token = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = token < S
    c, s = angles(cos, sin, positions, token, inside, P, PAIRS, HALF)
    x += row.to(tl.int64) * x_at[0] + token.to(tl.int64)[:, None] * x_at[1]
    out += row.to(tl.int64) * out_at[0] + token.to(tl.int64)[:, None] * out_at[1]
    for number in range(HEADS):
        head = group * HEADS + number
        real, of_head = head < H, head.to(tl.int64)
        here = inside[:, None] & real
        x_head, up_head, out_head = x + of_head * x_at[2], up + of_head * up_at[0], out + of_head * out_at[2]
        for first in range(0, N, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)[None, :]
            total = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
            for begin in range(0, K, BLOCK_K):
                k = begin + tl.arange(0, BLOCK_K)
                own = tl.load(x_head + k[None, :], mask=here & (k[None, :] < K), other=0.0)
                k = k[:, None]
                weight = tl.load(up_head + k * up_at[1] + n * up_at[2], mask=real & (k < K) & (n < N), other=0.0)
                total = tl.dot(own, weight, total, input_precision="ieee")
            tl.store(out_head + n, total.to(out.dtype.element_ty), mask=here & (n < N))
        turn(x_head + K, out_head + N, here, c, s, PAIRS, HALF, INTERLEAVED, BACK)


@triton.jit(do_not_specialize=COUNTS)
def up_gradient_kernel(
    q, d_out, partial,
    q_at, d_at,  # strides
    S, H, tiles, total, run, K: tl.constexpr, N: tl.constexpr, RUN: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """partial [splits, H, K, N] of q [B, S, H, K + …], d_out [B, S, H, N + …]; a split is run tiles of tokens,
    a multiple of RUN."""
    head, split = tl.program_id(0) % H, tl.program_id(0) // H
    columns = tl.cdiv(N, BLOCK_N)
    k = tl.program_id(1) // columns * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    n = tl.program_id(1) % columns * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    q += head.to(tl.int64) * q_at[2]
    d_out += head.to(tl.int64) * d_at[2]
    sums = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    done = 0
    while done < run:
        for number in range(RUN):
            tile = split * run + done + number
            row = (tile // tiles).to(tl.int64)
            token = (tile % tiles * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
            inside, place = (token < S) & (tile < total), token.to(tl.int64)
            own = tl.load(q + row * q_at[0] + place * q_at[1] + k, mask=inside & (k < K), other=0.0)
            gradient = tl.load(d_out + row * d_at[0] + place * d_at[1] + n, mask=inside & (n < N), other=0.0)
            sums = tl.dot(tl.trans(own), gradient, sums, input_precision="ieee")
        done += RUN
    at = (split.to(tl.int64) * H + head) * K * N + tl.trans(k) * N + n
    tl.store(partial + at, sums.to(partial.dtype.element_ty), mask=(tl.trans(k) < K) & (n < N))


@triton.jit
def norm(x, weight, out, inside, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """out = x / rms(x) · weight for the rows x, out [T, 1]; a copy without weight."""
    column = tl.arange(0, BLOCK)[None, :]
    here = inside & (column < WIDTH)
    t = tl.load(x + column, mask=here, other=0.0)
    if weight is not None:
        t = t.to(tl.float32)
        factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        t = t * tl.rsqrt(tl.sum(t * t, 1) / WIDTH + eps)[:, None] * factor
    tl.store(out + column, t.to(out.dtype.element_ty), mask=here)


@triton.jit
def norm_gradient(x, weight, d_out, d_x, d_weight, inside, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """d_x of the rows; gives d_weight [T, BLOCK] with these rows' part added."""
    column = tl.arange(0, BLOCK)[None, :]
    here = inside & (column < WIDTH)
    d = tl.load(d_out + column, mask=here, other=0.0)
    if weight is not None:
        d = d.to(tl.float32)
        t = tl.load(x + column, mask=here, other=0.0).to(tl.float32)
        factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(t * t, 1) / WIDTH + eps)[:, None]
        t *= rstd
        d_weight += d * t
        d *= factor
        d = rstd * (d - t * (tl.sum(d * t, 1) / WIDTH)[:, None])
    tl.store(d_x + column, d.to(d_x.dtype.element_ty), mask=here)
    return d_weight


@triton.jit(do_not_specialize=COUNTS)
def latents_kernel(
    q, kv, q_weight, kv_weight, cos, sin, positions, q_out, kv_out,
    q_at, kv_at,  # strides
    S, P, tiles, eps, LQ: tl.constexpr, L: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_L: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    token = tile * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = token < S
    c, s = angles(cos, sin, positions, token, inside, P, PAIRS, HALF)
    row, place, inside = row.to(tl.int64), token.to(tl.int64)[:, None], inside[:, None]
    at = row * S + place  # of the outputs' rows
    if q is not None:
        norm(q + row * q_at[0] + place * q_at[1], q_weight, q_out + at * LQ, inside, eps, LQ, BLOCK_Q)
    kv += row * kv_at[0] + place * kv_at[1]
    kv_out += at * (L + 2 * PAIRS)
    if L:
        norm(kv, kv_weight, kv_out, inside, eps, L, BLOCK_L)
    turn(kv + L, kv_out + L, inside, c, s, PAIRS, HALF, INTERLEAVED, False)


@triton.jit(do_not_specialize=COUNTS)
def latents_gradient_kernel(
    q, kv, q_weight, kv_weight, cos, sin, positions, d_q_out, d_kv_out, d_q, d_kv, partial,
    q_at, kv_at, d_q_out_at, d_kv_out_at, d_q_at, d_kv_at,  # strides
    S, P, tiles, total, programs, eps, LQ: tl.constexpr, L: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_L: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """partial [programs, LQ + L]: q_weight's and kv_weight's gradients from every programs-th tile of tokens."""
    q_sums = tl.zeros([BLOCK_T, BLOCK_Q], tl.float32)
    kv_sums = tl.zeros([BLOCK_T, BLOCK_L], tl.float32)
    number = tl.program_id(0)
    while number < total:
        row = (number // tiles).to(tl.int64)
        token = number % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = token < S
        c, s = angles(cos, sin, positions, token, inside, P, PAIRS, HALF)
        place, inside = token.to(tl.int64)[:, None], inside[:, None]
        if q is not None:
            q_sums = norm_gradient(
                q + row * q_at[0] + place * q_at[1], q_weight, d_q_out + row * d_q_out_at[0] + place * d_q_out_at[1],
                d_q + row * d_q_at[0] + place * d_q_at[1], q_sums, inside, eps, LQ, BLOCK_Q,
            )  # fmt: skip
        d_in = d_kv_out + row * d_kv_out_at[0] + place * d_kv_out_at[1]
        d = d_kv + row * d_kv_at[0] + place * d_kv_at[1]
        if L:
            x = kv
            if kv is not None:
                x += row * kv_at[0] + place * kv_at[1]
            kv_sums = norm_gradient(x, kv_weight, d_in, d, kv_sums, inside, eps, L, BLOCK_L)
        turn(d_in + L, d + L, inside, c, s, PAIRS, HALF, INTERLEAVED, True)
        number += programs
    partial += tl.program_id(0).to(tl.int64) * (LQ + L)
    if q is not None:
        column = tl.arange(0, BLOCK_Q)
        tl.store(partial + column, tl.sum(q_sums, 0), mask=column < LQ)
    if kv_weight is not None:
        column = tl.arange(0, BLOCK_L)
        tl.store(partial + LQ + column, tl.sum(kv_sums, 0), mask=column < L)
