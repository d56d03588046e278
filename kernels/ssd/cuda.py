"""The binding to csrc/ssd: what its kernels get, what code a shape needs, and the scan's operators with gradients.

Forward: `prepare` (Triton), then the kernel forward. Backward: turns, walk and gradient for each segment, the last first, then
`finish` (Triton) and sums over a segment's places. See csrc/ssd for what each writes.
"""

from __future__ import annotations

import functools
import math

import torch
from torch.autograd.function import once_differentiable

from nam56r.kernels.checks import needs_gradient
from nam56r.kernels.registry import Device
from nam56r.kernels.ssd.code import MAPPED, PASSES, Shape, code
from nam56r.kernels.ssd.finish import finish
from nam56r.kernels.ssd.prepare import allocate, prepare
from nam56r.kernels.ssd.sizes import MAMBA2, MIMO, SISO, Sizes, sizes_of

FIELDS = tuple(
    """
    x B C z dy  y dx dB dC dz  L W OWN DT angles B_bias C_bias D psi zeta phi  state angle  cu first sequence_of
    saved bases final final_k final_v final_angle  turns next_turns states carried energy dfinal dstate
    READ PAIRS WRITE DOWN DW dB_bias dC_bias dpsi dzeta dphi dD ddt_turned dangle_sum total
    S tokens H P heads_per_group G spans sequences every units splits angle_heads d_h d_p save
    segment segment_spans segments sums
    x_b x_s x_h B_b B_s B_r B_g C_b C_s C_r C_g z_b z_s z_h dy_b dy_s dy_h a_b a_s a_h
    dB_b dB_s dB_r dB_g dB_split dC_b dC_s dC_r dC_g dC_split
    """.split()
)  # of struct Arguments, in its order


def launch(kernels: tuple[str, ...], sizes: Sizes, fields: dict[str, torch.Tensor | int | None]) -> None:
    """Run kernels of one pass, one after the other, on the same fields; what isn't named is null.

    turns is launched early where it isn't the first: it needs nothing from the one before, and overlaps with its end.
    """
    x = fields["x"]
    shape = Shape(x.dtype, sizes.model, sizes.rank, sizes.d_state)
    values = [fields.get(field) for field in FIELDS]
    numbers = [v.data_ptr() if isinstance(v, torch.Tensor) else v or 0 for v in values]
    grids = {
        "forward": (sizes.all_units, sizes.sequences, 1),
        "turns": (-(-sizes.heads // 8), sizes.places, sizes.every),
        "walk": (sizes.all_units, sizes.sequences, 2),
        "gradient": (sizes.groups * sizes.splits, sizes.places, 1),
    }
    compiled_together = next(names for names in PASSES if kernels[0] in names)
    ready = code(compiled_together, shape, Device.of(x.device).capability)
    for kernel in kernels:
        one, early = ready[kernel], kernel == "turns" and kernel != kernels[0]
        torch.ops.nam56r.ssd_launch(
            x,
            one.handle,
            early,
            kernel in MAPPED,
            sizes.rank,
            sizes.d_state,
            *grids[kernel],
            one.threads,
            one.shared,
            numbers,
        )


def dense(t: torch.Tensor | None, strided: bool = True, apart: bool = False) -> torch.Tensor | None:
    """t, or a copy, with the last dimension dense, all rows on 16 bytes; with strided False contiguous.

    apart: and no row at another's place (an expanded dimension), as tensor maps of TMA have it.
    """
    if t is None:
        return None
    size = t.element_size()
    fits = t.data_ptr() % 16 == 0 and (t.is_contiguous() if not strided else t.stride(-1) == 1)
    if strided:
        along = [at for at, n in zip(t.stride()[:-1], t.shape) if n > 1]
        fits = fits and all(at * size % 16 == 0 for at in along) and not (apart and 0 in along)
        # within a chunk of at most 64 tokens the kernels count in 32 bits
        fits = fits and max(t.stride()[1:-1]) < 2**24
    if fits:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def gradient_like(t: torch.Tensor) -> torch.Tensor:
    """Where a gradient of t goes: in t's order of dimensions, but the last one dense."""
    like = torch.empty_like(t)
    return like if like.stride(-1) == 1 else torch.empty_like(t, memory_format=torch.contiguous_format)


def _wide(t: torch.Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def _sizes(x, B, angles, A, psi, cu_seqlens) -> Sizes:
    model = MAMBA2 if A is not None else SISO if psi is None else MIMO
    return sizes_of(model, x, B, angles, cu_seqlens)


def _strides(fields: dict, **tensors: tuple[torch.Tensor | None, str]) -> None:
    """Put the tensors and their strides (x_b, x_s, x_h) into the fields; those of what is missing are 0."""
    for name, (tensor, letters) in tensors.items():
        fields[name] = tensor
        if tensor is not None:
            prefix = "a" if name == "angles" else name
            fields |= {f"{prefix}_{letter}": at for letter, at in zip(letters, tensor.stride())}


def _fields(sizes, x, B, C, angles, B_bias, C_bias, D, z, psi, zeta, phi, cu_seqlens, steps, tables) -> dict:
    """What forward and backward share."""
    fields = dict(
        S=sizes.length, tokens=sizes.tokens, H=sizes.heads, P=sizes.headdim, G=sizes.groups,
        heads_per_group=sizes.heads // sizes.groups, spans=sizes.spans, sequences=sizes.sequences, every=sizes.every,
        units=sizes.units, splits=sizes.splits, angle_heads=sizes.angle_heads, segment_spans=sizes.segment_spans, segments=sizes.segments,
        B_bias=dense(B_bias, False), C_bias=dense(C_bias, False), psi=dense(psi, False), zeta=dense(zeta, False),
        phi=dense(phi, False), D=D, cu=cu_seqlens,
    )  # fmt: skip
    _strides(
        fields, x=(dense(x, apart=True), "bsh"), B=(dense(B, apart=True), "bsrg"), C=(dense(C, apart=True), "bsrg"),
        z=(dense(z, apart=True), "bsh"),
        angles=(None if angles is None else dense(torch.tanh(angles)), "bsh"),
    )  # fmt: skip
    if sizes.angle_heads == 1:
        fields["a_h"] = 0
    if D is not None:
        fields |= {"d_h": D.stride(0), "d_p": D.stride(1) if D.ndim == 2 else 0}
    fields |= zip(("L", "W", "OWN", "DT"), steps if sizes.model else (steps[0], steps[1], steps[1], steps[1]))
    if sizes.packed:
        fields |= {"first": tables, "sequence_of": tables[sizes.sequences + 1 :]}
    return fields


_SCHEMAS = (
    "ssd_scan(Tensor x, Tensor B, Tensor C, Tensor dt, Tensor? log_decay, Tensor? trap, Tensor? angles, Tensor? A, "
    "Tensor? dt_bias, bool softplus, Tensor? B_bias, Tensor? C_bias, Tensor? D, Tensor? z, Tensor? psi, Tensor? zeta, "
    "Tensor? phi, Tensor? state, Tensor? angle, Tensor? cu_seqlens, bool save) -> (Tensor y, Tensor final, "
    "Tensor final_k, Tensor final_v, Tensor final_angle, Tensor saved, Tensor bases, Tensor steps, Tensor tables)",
    "ssd_scan_backward(Tensor? dy, Tensor? dfinal, Tensor? dfinal_k, Tensor? dfinal_v, Tensor? dfinal_angle, Tensor x, "
    "Tensor B, Tensor C, Tensor dt, Tensor? trap, Tensor? angles, Tensor? A, Tensor? dt_bias, bool softplus, "
    "Tensor? B_bias, Tensor? C_bias, Tensor? D, Tensor? z, Tensor? psi, Tensor? zeta, Tensor? phi, Tensor? cu_seqlens, "
    "Tensor final_angle, Tensor saved, Tensor bases, Tensor steps, Tensor tables, bool state, bool angle) "
    "-> (Tensor dx, Tensor dB, Tensor dC, Tensor ddt, Tensor dlog_decay, Tensor dtrap, Tensor dangles, Tensor dA, "
    "Tensor ddt_bias, Tensor dB_bias, Tensor dC_bias, Tensor dD, Tensor dz, Tensor dpsi, Tensor dzeta, Tensor dphi, "
    "Tensor dstate, Tensor dangle)",
)


def _outputs(sizes: Sizes, x: torch.Tensor, save: bool) -> tuple[torch.Tensor, ...]:
    """y, final, final_k, final_v, final_angle, saved, bases, unwritten; what the model hasn't, or isn't saved, is [0]."""
    wide, n, heads = _wide(x), sizes.sequences, sizes.heads
    none, turned = (0,), sizes.model != MAMBA2
    state = heads, sizes.headdim, sizes.d_state

    def new(*shape, dtype=wide):
        return x.new_empty(shape, dtype=dtype)

    return (
        new(*x.shape, dtype=x.dtype),
        new(n, *state),
        new(*((n, heads, sizes.rank, sizes.d_state) if turned else none)),
        new(*((n, heads, sizes.rank, sizes.headdim) if turned else none)),
        new(*((n, heads, sizes.pairs) if turned else none)),
        new(*((sizes.parts, *state) if save else none)),
        new(*((sizes.chunks, heads, sizes.pairs) if save and turned else none)),
    )


def _scan(
    x, B, C, dt, log_decay, trap, angles, A, dt_bias, softplus, B_bias, C_bias, D, z, psi, zeta, phi, state, angle,
    cu_seqlens, save,
):  # fmt: skip
    sizes = _sizes(x, B, angles, A, psi, cu_seqlens)
    outputs = _outputs(sizes, x, save)
    y, final, final_k, final_v, final_angle, saved, bases = outputs
    if sizes.packed or not sizes.tokens:  # an empty sequence's are not written
        for t in (final_k, final_v, final_angle):
            t.zero_()
    if not sizes.tokens:
        final.zero_() if state is None else final.copy_(state)
        return *outputs, *allocate(sizes, dt, final.dtype)
    steps, tables = prepare(sizes, dt, log_decay, trap, A, dt_bias, softplus, cu_seqlens, final.dtype)
    fields = _fields(sizes, x, B, C, angles, B_bias, C_bias, D, z, psi, zeta, phi, cu_seqlens, steps, tables)
    fields |= dict(
        state=dense(state, False), angle=dense(angle, False), y=y, final=final, final_k=final_k, final_v=final_v,
        final_angle=final_angle, saved=saved if save else None, bases=bases if save else None, save=int(save),
    )  # fmt: skip
    launch(PASSES[0], sizes, fields)
    return *outputs, steps, tables


def _scan_shapes(
    x, B, C, dt, log_decay, trap, angles, A, dt_bias, softplus, B_bias, C_bias, D, z, psi, zeta, phi, state, angle,
    cu_seqlens, save,
):  # fmt: skip
    sizes = _sizes(x, B, angles, A, psi, cu_seqlens)
    return *_outputs(sizes, x, save), *allocate(sizes, dt, _wide(x))


def _scan_backward(
    dy, dfinal, dfinal_k, dfinal_v, dfinal_angle, x, B, C, dt, trap, angles, A, dt_bias, softplus, B_bias, C_bias, D, z,
    psi, zeta, phi, cu_seqlens, final_angle, saved, bases, steps, tables, state, angle,
):  # fmt: skip
    sizes = _sizes(x, B, angles, A, psi, cu_seqlens)
    if not sizes.tokens:
        empty = _gradients(
            sizes, x, B, C, dt, trap, angles, A, dt_bias, B_bias, C_bias, D, z, psi, zeta, phi, state, angle
        )
        for t, given in zip(empty, (*[None] * 16, dfinal, dfinal_angle)):
            t.zero_() if given is None else t.copy_(given)
        return empty
    wide, turned, mimo = _wide(x), sizes.model != MAMBA2, sizes.model == MIMO
    units, tokens, heads = sizes.all_units, sizes.tokens, sizes.heads
    fields = _fields(sizes, x, B, C, angles, B_bias, C_bias, D, z, psi, zeta, phi, cu_seqlens, steps, tables)

    def new(*shape, dtype=wide):
        return x.new_empty(shape, dtype=dtype)

    dx, dz = new(*x.shape, dtype=x.dtype), None if z is None else new(*x.shape, dtype=x.dtype)
    if sizes.splits == 1:
        dB, dC = gradient_like(B), gradient_like(C)
        _strides(fields, dB=(dB, "bsrg"), dC=(dC, "bsrg"))
    else:
        dB, dC = new(sizes.splits, *B.shape), new(sizes.splits, *C.shape)
        for name, t in (("dB", dB), ("dC", dC)):
            fields |= zip((f"{name}_{letter}" for letter in ("split", "b", "s", "r", "g")), t.stride())
            fields[name] = t
    partial = {name: new(units, tokens) for name in ("READ", "PAIRS", "WRITE", "DOWN", "DW")}
    partial["energy"] = new(sizes.chunks, units)
    shapes = {}  # of what every segment's launch adds to, for each place
    if turned:
        partial |= dict(ddt_turned=new(units, tokens), dangle_sum=new(sizes.angle_rows, tokens, sizes.pairs))
        partial["total"] = new(sizes.chunks, units, sizes.pairs)
        shapes |= dict.fromkeys(("dB_bias", "dC_bias"), (units, max(4, sizes.rank), sizes.d_state))  # a row a warp
    if mimo:
        shapes |= dict.fromkeys(("dpsi", "dzeta", "dphi"), (heads, sizes.rank, sizes.headdim))
    if D is not None:
        shapes["dD"] = heads, sizes.headdim
    lengths = [math.prod(shape) for shape in shapes.values()]
    sums = x.new_zeros((sizes.places, sum(lengths)), dtype=wide)

    def each(parts):
        return {name: part.unflatten(-1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}

    _strides(fields, dy=(dense(torch.zeros_like(x) if dy is None else dy), "bsh"))
    dstate = new(sizes.sequences, heads, sizes.headdim, sizes.d_state)
    states, carried = (new(sizes.places * sizes.every, units, sizes.tile, dtype=x.dtype) for _ in range(2))
    # of two segments: those of the next are made while gradient reads these
    turns = new(min(2, sizes.segments), sizes.places * sizes.every, sizes.heads, sizes.turns, dtype=torch.int32)
    fields |= partial | each(sums.split(lengths, 1)) | {"sums": sums.stride(0)}
    fields |= dict(
        saved=saved, bases=bases if turned else None, states=states, carried=carried, dfinal=dense(dfinal, False),
        dstate=dstate, dx=dx, dz=dz,
    )  # fmt: skip
    if turned:  # of the last segment
        fields |= dict(segment=sizes.segments * sizes.segment_spans, next_turns=turns[(sizes.segments - 1) % 2])
        launch(("turns",), sizes, fields)
    for segment in reversed(range(sizes.segments)):
        fields |= dict(
            segment=segment * sizes.segment_spans, turns=turns[segment % 2], next_turns=turns[segment % 2 - 1]
        )
        launch(("walk", "gradient", "turns") if turned and segment else ("walk", "gradient"), sizes, fields)

    if sizes.splits > 1:
        dB, dC = dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype)
    totals = each(
        torch.split_with_sizes_copy(sums.sum(0), lengths)
    )  # copies: what an operator returns must not be views
    for name in ("dB_bias", "dC_bias") if turned else ():
        t = totals[name].view(heads, sizes.blocks, sizes.rank, -1, sizes.d_state)
        totals[name] = t[:, 0, :, 0] if t.shape[1] == t.shape[3] == 1 else t.sum((1, 3))
    if D is not None and D.ndim == 1:
        totals["dD"] = totals["dD"].sum(1)
    if turned and (dfinal_k is not None or dfinal_v is not None):
        dfinal_angle = _last(
            sizes, dfinal_k, dfinal_v, dfinal_angle, x, B, B_bias, psi, final_angle, cu_seqlens, dx, dB, totals
        )
    ddt, dlog_decay, dtrap, dangles, dA, ddt_bias, dangle = finish(
        sizes, partial, steps, tables, dt, trap, fields["angles"], A, dt_bias, softplus, cu_seqlens,
        dense(dfinal_angle, False), angle,
    )  # fmt: skip
    gradients = (
        dx, dB, dC, ddt, dlog_decay, dtrap, dangles, dA, ddt_bias, totals.get("dB_bias"), totals.get("dC_bias"),
        totals.get("dD"), dz, totals.get("dpsi"), totals.get("dzeta"), totals.get("dphi"), dstate if state else None, dangle,
    )  # fmt: skip
    return tuple(new(0) if t is None else t for t in gradients)


def _last(sizes, dk, dv, dangle, x, B, B_bias, psi, final_angle, cu_seqlens, dx, dB, totals):
    """Add what the last k and v of every sequence give to dx, dB, dB_bias and dpsi; gives dfinal_angle with its part."""
    rows = torch.arange(sizes.sequences, device=x.device)
    at = torch.full_like(rows, sizes.length - 1)
    if sizes.packed:
        rows, at = torch.zeros_like(rows), (cu_seqlens[1:].long() - 1).clamp(min=0)
        there = (cu_seqlens[1:] > cu_seqlens[:-1])[:, None, None, None]
    if dk is not None:
        if sizes.packed:
            dk = dk.where(there, 0)
        adjacent = sizes.model == SISO
        u = B[rows, at].to(dk.dtype).transpose(1, 2).repeat_interleave(sizes.heads // sizes.groups, 1) + B_bias
        if sizes.packed:
            u = u.where(there, 0)  # an empty sequence's is another's, which may hold NaN
        cos, sin = final_angle.cos()[:, :, None], final_angle.sin()[:, :, None]
        du = dk.clone()  # k is u turned
        (a, b), (da, db) = _pairs(u, sizes.pairs, adjacent), _pairs(du, sizes.pairs, adjacent)
        back = da * cos + db * sin, db * cos - da * sin
        da.copy_(back[0]), db.copy_(back[1])
        turned = (a * db - b * da).sum(2)
        dangle = turned if dangle is None else dangle + turned
        totals["dB_bias"] += du.sum(0)
        of_group = du.unflatten(1, (sizes.groups, -1)).sum(2).transpose(1, 2)
        _add(dB, rows, at, of_group, sizes)
    if dv is not None:
        if sizes.packed:
            dv = dv.where(there, 0)
        if psi is not None:
            v = x[rows, at].to(dv.dtype)[:, :, None]
            totals["dpsi"] += (dv * (v.where(there, 0) if sizes.packed else v)).sum(0)
            dv = dv * psi
        _add(dx, rows, at, dv.sum(2), sizes)
    return dangle


def _pairs(t: torch.Tensor, pairs: int, adjacent: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The two halves of the turned pairs of t [..., N]."""
    if adjacent:
        return t[..., 0 : 2 * pairs : 2], t[..., 1 : 2 * pairs : 2]
    return t[..., :pairs], t[..., t.shape[-1] // 2 :][..., :pairs]


def _add(to: torch.Tensor, rows: torch.Tensor, at: torch.Tensor, more: torch.Tensor, sizes: Sizes) -> None:
    """to[rows, at] += more in more's precision; an empty sequence's zero may meet another's row, so it is accumulated."""
    if sizes.packed:
        to.index_put_((rows, at), more.to(to.dtype), accumulate=True)
    else:
        to[rows, at] = (to[rows, at] + more).to(to.dtype)


def _gradients(sizes, x, B, C, dt, trap, angles, A, dt_bias, B_bias, C_bias, D, z, psi, zeta, phi, state, angle):
    """The backward's results, unwritten."""
    wide, n, heads = _wide(x), sizes.sequences, sizes.heads

    def like(t, **change):
        return x.new_empty(0, dtype=wide) if t is None else torch.empty_like(t, **change)

    dense_like = functools.partial(like, memory_format=torch.contiguous_format)
    of_states = [B, C] if sizes.splits > 1 else []
    dB, dC = (dense_like(t) for t in of_states) if of_states else (gradient_like(B), gradient_like(C))
    return (
        dense_like(x), dB, dC, like(dt), like(None if trap is None else dt, dtype=wide), like(trap), dense_like(angles),
        *(dense_like(t) for t in (A, dt_bias, B_bias, C_bias, D, z, psi, zeta, phi)),
        x.new_empty((n, heads, sizes.headdim, sizes.d_state) if state else 0, dtype=wide),
        x.new_empty((n, heads, sizes.pairs) if angle else 0, dtype=wide),
    )  # fmt: skip


def _backward_shapes(
    dy, dfinal, dfinal_k, dfinal_v, dfinal_angle, x, B, C, dt, trap, angles, A, dt_bias, softplus, B_bias, C_bias, D, z,
    psi, zeta, phi, cu_seqlens, final_angle, saved, bases, steps, tables, state, angle,
):  # fmt: skip
    sizes = _sizes(x, B, angles, A, psi, cu_seqlens)
    return _gradients(sizes, x, B, C, dt, trap, angles, A, dt_bias, B_bias, C_bias, D, z, psi, zeta, phi, state, angle)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        output = _below_autograd(*inputs)
        (
            x, B, C, dt, log_decay, trap, angles, A, dt_bias, ctx.softplus, B_bias, C_bias, D, z, psi, zeta, phi, state,
            angle, cu_seqlens, _,
        ) = inputs  # fmt: skip
        _, _, final_k, final_v, final_angle, *kept = output
        ctx.save_for_backward(
            x, B, C, dt, trap, angles, A, dt_bias, B_bias, C_bias, D, z, psi, zeta, phi, cu_seqlens, final_angle, *kept,
        )  # fmt: skip
        ctx.given = [t is not None for t in inputs]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*kept, *(() if A is None else (final_k, final_v, final_angle)))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal, dfinal_k, dfinal_v, dfinal_angle, *_):
        (x, B, C, dt, trap, angles, A, dt_bias, *parameters), given = ctx.saved_tensors, ctx.given
        (
            dx, dB, dC, ddt, dlog_decay, dtrap, dangles, dA, ddt_bias, dB_bias, dC_bias, dD, dz, dpsi, dzeta, dphi, dstate,
            dangle,
        ) = torch.ops.nam56r.ssd_scan_backward(
            dy, dfinal, dfinal_k, dfinal_v, dfinal_angle, x, B, C, dt, trap, angles, A, dt_bias, ctx.softplus, *parameters,
            given[17], given[18],
        )  # fmt: skip
        gradients = (
            dx, dB, dC, ddt, dlog_decay, dtrap, dangles, dA, ddt_bias, None, dB_bias, dC_bias, dD, dz, dpsi, dzeta, dphi,
            dstate, dangle, None, None,
        )  # fmt: skip
        return tuple(t if there else None for t, there in zip(gradients, given))


def _below_autograd(*inputs):
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.nam56r.ssd_scan.default(*inputs)


def _autograd(*inputs):  # the last is save: without it there is no gradient
    return (_Scan.apply if inputs[-1] else _below_autograd)(*inputs)


# not torch.library.custom_op and register_autograd, whose wrappers cost more on the host than the launches
LIBRARY = torch.library.Library("nam56r", "FRAGMENT")
for _schema in _SCHEMAS:
    LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.impl("ssd_scan", _autograd, "Autograd")
LIBRARY.impl("ssd_scan", _scan, "CUDA")
LIBRARY.impl("ssd_scan_backward", _scan_backward, "CUDA")
torch.library.register_fake("nam56r::ssd_scan", _scan_shapes, lib=LIBRARY)
torch.library.register_fake("nam56r::ssd_scan_backward", _backward_shapes, lib=LIBRARY)


def scan(
    x: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    dt: torch.Tensor,
    *,
    log_decay: torch.Tensor | None = None,
    trap: torch.Tensor | None = None,
    angles: torch.Tensor | None = None,
    A: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    softplus: bool = False,
    B_bias: torch.Tensor | None = None,
    C_bias: torch.Tensor | None = None,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    mimo: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    state: torch.Tensor | None = None,
    angle: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The scan of both families; A is Mamba-2's, and tells which it is.

    x, z [B, S, H, P]; B, C [B, S, R, G, N]; dt, log_decay, trap [B, H, S]; angles [B, S, 1 or H, N / 4]; A, dt_bias [H];
    B_bias, C_bias [H, R, N]; D [H] or [H, P]; mimo three [H, R, P]; state [n, H, P, N], with the first token's trapezoid
    in it; angle [n, H, N / 4]; cu_seqlens [n + 1] int32. Any strides, and dtypes but for x, B, C, z.
    Returns y, and the final state, k, v and angle in fp32 (k, v, angle are [0] for Mamba-2, zero for empty sequences).
    """
    wide = _wide(x)
    parameters = (angles, A, dt_bias, B_bias, C_bias, D, *(mimo or (None, None, None)), state, angle)
    angles, A, dt_bias, B_bias, C_bias, D, psi, zeta, phi, state, angle = (
        None if t is None else t.to(wide) for t in parameters
    )
    bounds = None if cu_seqlens is None else cu_seqlens.contiguous()
    inputs = (
        x, B, C, dt, log_decay, trap, angles, A, dt_bias, softplus, B_bias, C_bias, D, z, psi, zeta, phi, state, angle,
        bounds,
    )  # fmt: skip
    return torch.ops.nam56r.ssd_scan(*inputs, needs_gradient(*inputs))[:5]
