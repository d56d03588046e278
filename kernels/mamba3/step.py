"""One token of Mamba-3 in Triton, for decoding: a state in, the next state out, one launch.

One program is one sequence and head, and holds its state S [P, N] in registers, in fp32, 32 elements a thread:

    S ⟵ α (S + (1 − λ) dt Σ_r v_{t-1,r} k_{t-1,r}ᵀ) + λ dt Σ_r v_{t,r} k_{t,r}ᵀ
    y = Σ_r w_r ⊙ (S q_r + D v_r),   w_r = Φ_r ⊙ silu(z ⊙ ζ_r)

Bound: memory, 8 P N bytes a program (S in and out); the rest of what it reads, R (3 P + 6 N) elements or so, comes from
the caches. An element's partner in its rotated pair is loaded a second time, where an exchange between threads would
take barriers. On sm_90 in bf16, P 64 and N 128 fit 128 registers, all but 24 bytes at rank 4; P 128 with N 256 is 64
elements a thread, and spills.

A state may be written over the one that is read: one program alone reads its head's state, and a barrier separates what
several of its threads read (k, v, angle) from its stores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from nam56r.kernels.mamba3.state import Mamba3State
from nam56r.kernels.triton_runtime import register_operator

PI = tl.constexpr(3.141592653589793)
TWO_PI = tl.constexpr(6.2831854820251465)  # rounded to fp32
TWO_PI_REST = tl.constexpr(-1.7484555314695172e-07)  # what that is off by
LOG2_E = tl.constexpr(1.4426950216293335)  # rounded to fp32
LOG2_E_REST = tl.constexpr(1.9259629911266175e-08)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp(t):
    """e^t as near as PyTorch's: tl.exp rounds t log₂ e, which is an error of |t| roundings."""
    t = tl.where(t < -200, -200.0, tl.where(t > 200, 200.0, t))  # 0 and inf, also for infinite t; NaN stays
    twos = t * LOG2_E
    rest = tl.fma(t, LOG2_E, -twos) + t * LOG2_E_REST
    return tl.exp2(twos) * (1 + LN_2 * rest)


@triton.jit
def tanh(t):
    shrunk = exp(-2 * tl.abs(t))
    size = tl.div_rn(1 - shrunk, 1 + shrunk)
    return tl.where(t < 0, -size, size)


@triton.jit
def wrap(t):
    """t mod 2π, in [0, 2π)."""
    turns = tl.floor(t / TWO_PI)
    t = tl.fma(-turns, TWO_PI, t)
    t = tl.fma(-turns, TWO_PI_REST, t)
    t = tl.where(t < 0, t + TWO_PI, t)
    return tl.where(t >= TWO_PI, t - TWO_PI, t)


@triton.jit
def rotated(at, bias, stride, m, partner, inside, cos, sin):
    """[BLOCK_N] of k or q: at [N] of B or C plus bias [N], each element turned with its partner."""
    own = tl.load(at + m.to(tl.int64) * stride, mask=inside, other=0.0).to(tl.float32)
    own += tl.load(bias + m, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(at + partner.to(tl.int64) * stride, mask=inside, other=0.0).to(tl.float32)
    other += tl.load(bias + partner, mask=inside, other=0.0).to(tl.float32)
    return own * cos + other * sin


@triton.jit
def step_kernel(
    x, B, C, dt, log_decay, trap, angles, B_bias, C_bias, D, z, psi, zeta, phi,
    old_ssm, old_k, old_v, old_angle, ssm, k, v, angle, y,
    x_at, B_at, C_at, dt_at, decay_at, trap_at, angles_at, z_at,  # strides
    H: tl.constexpr, HEADS_PER_GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, N_A: tl.constexpr,
    R: tl.constexpr, ADJACENT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    row, head = program // H, program % H
    group = head // HEADS_PER_GROUP

    m = tl.arange(0, BLOCK_N)
    inside = m < N
    if ADJACENT:
        pair, second, partner = m // 2, m % 2 == 1, m ^ 1
    else:
        second = m >= N // 2
        pair = tl.where(second, m - N // 2, m)
        partner = tl.where(second, m - N // 2, m + N // 2)
    turned = inside & (pair < N_A)

    duration = tl.load(dt + row * dt_at[0] + head * dt_at[1]).to(tl.float32)
    decay = exp(tl.load(log_decay + row * decay_at[0] + head * decay_at[1]).to(tl.float32))
    mix = tl.load(trap + row * trap_at[0] + head * trap_at[1]).to(tl.float32)
    own, carried = tl.div_rn(duration, 1 + exp(-mix)), tl.div_rn(duration, 1 + exp(mix))

    # what isn't turned has angle 0: cos 1, sin 0
    theta = tl.load(old_angle + program * N_A + pair, mask=turned, other=0.0)
    raw = angles + row * angles_at[0] + head * angles_at[1] + pair.to(tl.int64) * angles_at[2]
    raw = tl.load(raw, mask=turned, other=0.0).to(tl.float32)
    theta = wrap(theta + PI * tanh(raw) * duration)
    cos, sin = tl.cos(theta), tl.sin(theta)
    sin = tl.where(second, sin, -sin)  # (a, b) becomes (a cos − b sin, b cos + a sin)

    skip = tl.load(D + head).to(tl.float32)
    p = tl.arange(0, BLOCK_P)
    lies = p < P
    tile, both = p[:, None] * N + m[None, :], lies[:, None] & inside[None, :]
    state = tl.load(old_ssm + program * P * N + tile, mask=both, other=0.0)
    for r in tl.static_range(R):
        at = program * R + r
        before = carried * tl.load(old_v + at * P + p, mask=lies, other=0.0)
        state += before[:, None] * tl.load(old_k + at * N + m, mask=inside, other=0.0)[None, :]
    state *= decay
    tl.debug_barrier()

    token = x + row * x_at[0] + head * x_at[1] + p.to(tl.int64) * x_at[2]
    token = tl.load(token, mask=lies, other=0.0).to(tl.float32)
    B += row * B_at[0] + group * B_at[2]
    C += row * C_at[0] + group * C_at[2]
    for r in tl.static_range(R):
        of_head, at = head * R + r, program * R + r
        rank = tl.full([], r, tl.int64)
        k_r = rotated(B + rank * B_at[1], B_bias + of_head * N, B_at[3], m, partner, inside, cos, sin)
        v_r = token
        if psi is not None:
            v_r *= tl.load(psi + of_head * P + p, mask=lies, other=0.0).to(tl.float32)
        state += (own * v_r)[:, None] * k_r[None, :]
        tl.store(v + at * P + p, v_r, mask=lies)
        tl.store(k + at * N + m, k_r, mask=inside)
    tl.store(ssm + program * P * N + tile, state, mask=both)

    if z is not None:
        gate = z + row * z_at[0] + head * z_at[1] + p.to(tl.int64) * z_at[2]
        gate = tl.load(gate, mask=lies, other=0.0).to(tl.float32)
    skipped = tl.zeros([BLOCK_P], tl.float32)
    read = tl.zeros([BLOCK_P, BLOCK_N // 4], tl.float32)
    for r in tl.static_range(R):
        of_head = head * R + r
        rank = tl.full([], r, tl.int64)
        q_r = rotated(C + rank * C_at[1], C_bias + of_head * N, C_at[3], m, partner, inside, cos, sin)
        v_r = token
        weight = tl.full([BLOCK_P], 1.0, tl.float32)
        if psi is not None:
            v_r *= tl.load(psi + of_head * P + p, mask=lies, other=0.0).to(tl.float32)
            weight = tl.load(phi + of_head * P + p, mask=lies, other=0.0).to(tl.float32)
        if z is not None:
            gate_r = gate
            if psi is not None:
                gate_r *= tl.load(zeta + of_head * P + p, mask=lies, other=0.0).to(tl.float32)
            weight *= gate_r / (1 + tl.exp(-gate_r))
        read += weight[:, None] * tl.sum(tl.reshape(state * q_r[None, :], [BLOCK_P, BLOCK_N // 4, 4]), 2)
        skipped += weight * v_r
    out = tl.sum(read, 1) + skip * skipped
    tl.store(y + program * P + p, out.to(y.dtype.element_ty), mask=lies)
    tl.store(angle + program * N_A + pair, theta, mask=turned & (second == 0))


def blocks(headdim: int, d_state: int) -> tuple[int, int, int]:
    """What holds S [P, N]: rows and columns, powers of two, and warps, for 32 elements a thread, at most 16."""
    rows, columns = triton.next_power_of_2(headdim), max(4, triton.next_power_of_2(d_state))
    return rows, columns, min(16, max(1, rows * columns // 1024))


_SCHEMA = (
    "mamba3_step(Tensor x, Tensor B, Tensor C, Tensor dt, Tensor log_decay, Tensor trap, Tensor angles, Tensor B_bias, "
    "Tensor C_bias, Tensor D, Tensor? z, Tensor? psi, Tensor? zeta, Tensor? phi, Tensor old_ssm, Tensor old_k, "
    "Tensor old_v, Tensor old_angle, Tensor(a!) ssm, Tensor(b!) k, Tensor(c!) v, Tensor(d!) angle) -> Tensor"
)


def _step(
    x, B, C, dt, log_decay, trap, angles, B_bias, C_bias, D, z, psi, zeta, phi,
    old_ssm, old_k, old_v, old_angle, ssm, k, v, angle,
):  # fmt: skip
    (rows, heads, headdim), (rank, groups, d_state) = x.shape, B.shape[1:]
    y = x.new_empty(x.shape)
    if not rows:
        return y
    angles_at = angles.stride() if angles.shape[1] == heads else (angles.stride(0), 0, angles.stride(2))
    block_p, block_n, warps = blocks(headdim, d_state)
    with torch.cuda.device_of(x):
        step_kernel[(rows * heads,)](
            x, B, C, dt, log_decay, trap, angles, B_bias, C_bias, D, z, psi, zeta, phi,
            old_ssm, old_k, old_v, old_angle, ssm, k, v, angle, y,
            x.stride(), B.stride(), C.stride(), dt.stride(), log_decay.stride(), trap.stride(), angles_at,
            (0, 0, 0) if z is None else z.stride(),
            heads, heads // groups, headdim, d_state, angles.shape[-1], rank, psi is None, block_p, block_n,
            num_warps=warps, maxnreg=128,  # two programs of 8 warps a processor
        )  # fmt: skip
    return y


register_operator(_SCHEMA, _step, lambda x, *_: x.new_empty(x.shape))


def mamba3_step(
    x: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    dt: torch.Tensor,
    log_decay: torch.Tensor,
    trap: torch.Tensor,
    angles: torch.Tensor,
    B_bias: torch.Tensor,
    C_bias: torch.Tensor,
    D: torch.Tensor,
    z: torch.Tensor | None = None,
    *,
    mimo: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    state: Mamba3State,
    out: Mamba3State | None = None,
) -> tuple[torch.Tensor, Mamba3State]:
    """See `nam56r.kernels.mamba3.mamba3_step`."""
    B_bias, C_bias, D = B_bias.contiguous(), C_bias.contiguous(), D.contiguous()
    psi, zeta, phi = (t.contiguous() for t in mimo) if mimo else (None, None, None)
    out = out or Mamba3State(*(torch.empty_like(t, memory_format=torch.contiguous_format) for t in state))
    old = (t.contiguous() for t in state)
    y = torch.ops.nam56r.mamba3_step(
        x, B, C, dt, log_decay, trap, angles, B_bias, C_bias, D, z, psi, zeta, phi, *old, *out
    )
    return y, out
