"""The four kernels of csrc/ssd in plain PyTorch, any dtype: what each reads and writes, from the fields that it gets.

A span is one differentiable function of everything in it; what the backward's kernels write are its gradients. Heads are
units here: a head's P columns in blocks of at most 64.
"""

import math
from types import SimpleNamespace

import torch

from nam56r.kernels.ssd.cuda import FIELDS

GARBAGE = 7.0  # in scratch memory, whose content means nothing


def launch(kernels, sizes, fields):
    """Stands for nam56r.kernels.ssd.cuda.launch."""
    for kernel in kernels:
        {"forward": forward, "query": query, "carry": carry, "key": key}[kernel](Problem(sizes, fields))


class Problem:
    """The fields as the kernels see them: strided views, units, sequences, spans."""

    def __init__(self, sizes, fields):
        self.f = f = SimpleNamespace(**dict.fromkeys(FIELDS) | fields)
        self.model, self.R, self.P, self.N, self.CT = sizes.model, sizes.rank, sizes.headdim, sizes.d_state, sizes.chunk
        self.H, self.S, self.NA = f.H, f.S, self.N // 4
        self.BP = min(self.P, 64)
        self.blocks = self.P // self.BP
        self.U = self.H * self.blocks
        self.rows = f.tokens // self.S
        heads, states = (self.rows, self.S, self.H, self.P), (self.rows, self.S, self.R, f.G, self.N)
        self.x, self.z, self.dy = (self.strided(name, heads, "bsh") for name in ("x", "z", "dy"))
        self.B, self.C = (self.strided(name, states, "bsrg") for name in "BC")
        self.angles = self.strided("angles", (self.rows, self.S, self.H, self.NA), "bsh", "a")
        assert f.angles is None or f.angle_heads == self.H or f.a_h == 0
        self.wide = f.L.dtype

    def strided(self, name, shape, letters, prefix=None):
        t = getattr(self.f, name)
        if t is None:
            return None
        strides = [getattr(self.f, f"{prefix or name}_{letter}") for letter in letters]
        return t.as_strided(shape, (*strides, 1))

    def array(self, name, *shape):
        """A contiguous array of that shape."""
        t = getattr(self.f, name)
        assert t.is_contiguous() and t.numel() >= math.prod(shape), (name, t.shape, shape)
        return t.flatten()[: math.prod(shape)].view(shape)

    def sequences(self):
        """(number, row of the batch, first token in it, length, first token of all)"""
        if self.f.cu is None:
            return [(b, b, 0, self.S, b * self.S) for b in range(self.f.sequences)]
        cu = self.f.cu.tolist()
        return [(i, 0, cu[i], cu[i + 1] - cu[i], cu[i]) for i in range(self.f.sequences)]

    def first_span(self, i):
        return i * self.f.spans if self.f.cu is None else self.f.first[i].item()

    def spans_of(self, i):
        length = self.sequences()[i][3]
        return [(self.first_span(i) + k, k) for k in range(-(-length // (self.f.every * self.CT)))]

    def all_spans(self):
        """(span, sequence, its place in it) as a grid over all numbers sees them."""
        n = self.f.sequences
        if self.f.cu is None:
            return [(i * self.f.spans + k, i, k) for i in range(n) for k in range(self.f.spans)]
        marked = enumerate(self.f.sequence_of[: self.f.spans].tolist())
        return [(span, i, span - self.first_span(i)) for span, i in marked if i != n]

    def unit(self, t):
        """[..., H, P] -> [..., U, BP]"""
        return t.unflatten(-1, (self.blocks, self.BP)).flatten(-3, -2)

    def ranks(self, t):
        """[H, R, P] -> [U, R, BP]"""
        return t.view(self.H, self.R, self.blocks, self.BP).transpose(1, 2).flatten(0, 1)

    def by_unit(self, t):
        """[..., H, rest] with the head at dimension 0 -> [U, rest]"""
        return t.repeat_interleave(self.blocks, 0)

    def part(self, i, k, chunks=None):
        """What a span (or chunk) k of sequence i holds, as leaves: everything that y and the state depend on."""
        f, length = self.f, (chunks or self.f.every) * self.CT
        _, row, first, whole, token = self.sequences()[i]
        begin, end = k * length, min((k + 1) * length, whole)
        here, all_here = slice(first + begin, first + end), slice(token + begin, token + end)
        p = SimpleNamespace(row=row, here=here, tokens=all_here, length=end - begin)

        def of_groups(t):  # [l, R, G, N] -> [l, U, R, N]
            t = t[row, here].to(self.wide).transpose(1, 2)
            return t.repeat_interleave(f.heads_per_group * self.blocks, 1)

        p.B, p.C = of_groups(self.B), of_groups(self.C)
        if self.model:
            p.B = p.B + self.by_unit(f.B_bias)
            p.C = p.C + self.by_unit(f.C_bias)
        p.x = self.unit(self.x[row, here]).to(self.wide)
        p.z = None if self.z is None else self.unit(self.z[row, here]).to(self.wide)
        p.psi, p.zeta, p.phi = (self.ranks(t) if self.model == 2 else None for t in (f.psi, f.zeta, f.phi))
        if self.model == 2 and self.z is None:
            p.zeta = None
        p.D = p.x.new_zeros(self.U, self.BP)
        if f.D is not None:
            p.D = p.D + self.unit(f.D.as_strided((self.H, self.P), (f.d_h, f.d_p)))
        plane = self.H, f.tokens
        numbers = (self.array(name, *plane)[:, all_here] for name in ("L", "W", "OWN", "DT"))
        p.L, p.W, p.OWN, p.DT = map(self.by_unit, numbers)
        p.delta = torch.zeros_like(p.L)
        if self.model:
            p.tanh = torch.tanh(self.angles[row, here]).transpose(0, 1)  # [H, l, NA]
            p.turn = self.by_unit(p.tanh * math.pi) * p.DT[..., None]
            p.theta_q = p.theta_k = torch.zeros_like(p.turn)
        return p

    def bases(self, span):
        """Radians before every chunk of a span: [every, U, NA]"""
        f = self.f
        rows = f.bases[span * f.every : (span + 1) * f.every] * 2 * math.pi
        return rows.repeat_interleave(self.blocks, 1)

    def rotate(self, t, angle):
        """t [l, U, R, N] turned by angle [U, l, NA]: complex numbers."""
        turn = torch.polar(torch.ones_like(angle), angle).transpose(0, 1)[:, :, None]
        half = t.unflatten(-1, (-1, 2)) if self.model == 1 else t.unflatten(-1, (2, -1)).mT
        numbers = torch.view_as_complex(half.contiguous())
        numbers = torch.cat((numbers[..., : self.NA] * turn, numbers[..., self.NA :]), -1)
        parts = torch.view_as_real(numbers)
        return (parts if self.model == 1 else parts.mT).flatten(-2)

    def run(self, p, state, bases):
        """y [l, U, BP] and the state at the end of a span, chunk by chunk; also the last k and v."""
        outputs = []
        for j, at in enumerate(range(0, p.length, self.CT)):
            c = slice(at, min(at + self.CT, p.length))
            q, k = p.C[c], p.B[c]
            if self.model:
                angle = bases[j][:, None] + p.turn[:, c].cumsum(1)
                q, k = self.rotate(q, angle + p.theta_q[:, c]), self.rotate(k, angle + p.theta_k[:, c])
            v = p.x[c][:, :, None] * (p.psi if self.model == 2 else 1)
            L, w = p.L[:, c], p.W[:, c]
            below = (L + p.delta[:, c])[:, :, None] - L[:, None, :]
            earlier = torch.ones_like(below, dtype=torch.bool).tril(-1)
            mix = below.masked_fill(~earlier, -torch.inf).exp() * w[:, None, :] + torch.diag_embed(p.OWN[:, c])
            scores = torch.einsum("turn,suon->utrso", q, k) * mix[:, :, None, :, None]
            y = torch.einsum("utrso,suop->turp", scores, v)
            y = y + torch.einsum("turn,upn,ut->turp", q, state, (L + p.delta[:, c]).exp())
            y = y + p.D[:, None] * v
            if p.phi is not None:
                y = y * p.phi
            if p.z is not None:
                gate = p.z[c][:, :, None] * (1 if p.zeta is None else p.zeta)
                y = y * gate * torch.sigmoid(gate)
            outputs.append(y.sum(2))
            grown = (L[:, -1:] - L).exp() * w
            state = L[:, -1].exp()[:, None, None] * state + torch.einsum("us,surp,surn->upn", grown, v, k)
        return torch.cat(outputs), state, k[-1], v[-1]

    def gradients(self, p, state, bases, dstate, names):
        """Of Σ dy y + <the state at the end, dstate>, by the named leaves of p; "state" is the first state's."""
        with torch.enable_grad():
            leaves = {}
            for name in names:
                value = state if name == "state" else getattr(p, name)
                if value is not None:
                    leaves[name] = value.detach().clone().requires_grad_()
            changed = SimpleNamespace(**vars(p) | {n: t for n, t in leaves.items() if n != "state"})
            y, last, *_ = self.run(changed, leaves.get("state", state), bases)
            dy = self.unit(self.dy[p.row, p.here]).to(self.wide)
            loss = (dy * y).sum() + (0 if dstate is None else (dstate * last).sum())
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return SimpleNamespace(**dict(zip(leaves, found)))

    def states(self, name):
        """[spans, U, BP, N]"""
        t = getattr(self.f, name)
        return t.view(t.shape[0], self.U, self.BP, self.N)

    def per_group(self, name, p, gradient, index):
        """Write dB or dC [l, U, R, N] of a block's units into the group's place of its split."""
        f = self.f
        shape = self.rows, self.S, self.R, f.G, self.N
        strides = [getattr(f, f"{name}_{letter}") for letter in "bsrg"]
        out = getattr(f, name)
        g, split = divmod(index, f.splits)
        if f.splits > 1:
            assert out.dtype == self.wide
            out = out.as_strided((f.splits, *shape), (getattr(f, f"{name}_split"), *strides, 1))[split]
        else:
            out = out.as_strided(shape, (*strides, 1))
        out[p.row, p.here, :, g] = gradient[:, self.units(index)].sum(1).to(out.dtype)

    def units(self, index):
        """Of block `index` of a grid's x: groups × splits."""
        g, split = divmod(index, self.f.splits)
        first = g * self.f.heads_per_group * self.blocks + split * self.f.units
        return slice(first, first + self.f.units)

    def turned(self, side, p, span, theta):
        """ddt, dangle, total of q or k from theta [U, l, NA], the angles' gradients."""
        f, tokens = self.f, self.f.tokens
        total = self.array(f"total_{side}", f.spans_all * f.every, self.U, self.NA)
        ddt = self.array(f"ddt_{side}", self.U, tokens)
        wide_rows = f.G * f.splits if f.angle_heads == 1 else self.U
        dangle = self.array(f"dangle_{side}", wide_rows, tokens, self.NA)
        for j, at in enumerate(range(0, p.length, self.CT)):
            c = slice(at, min(at + self.CT, p.length))
            to = slice(p.tokens.start + c.start, p.tokens.start + c.stop)
            later = theta[:, c].flip(1).cumsum(1).flip(1)
            total[span * f.every + j] = theta[:, c].sum(1)
            ddt[:, to] = math.pi * (self.by_unit(p.tanh[:, c]) * later).sum(2)
            each = p.DT[:, c, None] * later
            if f.angle_heads == 1:
                for index in range(f.G * f.splits):
                    dangle[index, to] = each[self.units(index)].sum(0)
            else:
                dangle[:, to] = each

    @property
    def spans_all(self):
        return self.f.spans * (self.f.sequences if self.f.cu is None else 1)


def forward(a):
    f = a.f
    for i, row, first, length, _ in a.sequences():
        state = f.L.new_zeros(a.U, a.BP, a.N) if f.state is None else f.state[i].view(a.U, a.BP, a.N)
        turns = f.L.new_zeros(a.H, a.NA, dtype=torch.float64)
        if a.model and f.angle is not None:
            turns = (f.angle[i].double() / (2 * math.pi)) % 1
        span = a.first_span(i)
        for chunk in range(-(-length // a.CT)):
            if f.save:
                if chunk % f.every == 0:
                    a.states("saved")[span + chunk // f.every] = state.to(f.saved.dtype)
                if a.model:
                    f.bases[span * f.every + chunk] = turns
            p = a.part(i, chunk, chunks=1)
            base = (turns * 2 * math.pi).to(a.wide).repeat_interleave(a.blocks, 0)
            y, state, k, v = a.run(p, state, [base])
            a.array("y", a.rows, a.S, a.H, a.P)[row, p.here] = y.reshape(p.length, a.H, a.P).to(f.y.dtype)
            if a.model:
                turns = (turns + p.turn[:: a.blocks].sum(1) / (2 * math.pi)) % 1
        f.final[i] = state.view(a.H, a.P, a.N)
        if a.model and length:
            f.final_k[i] = k[:: a.blocks]
            f.final_v[i] = v.view(a.H, a.blocks, a.R, a.BP).transpose(1, 2).reshape(a.H, a.R, a.P)
            f.final_angle[i] = turns * 2 * math.pi


def query(a):
    f = a.f
    f.spans_all = a.spans_all
    f.carried.fill_(GARBAGE)
    for span, i, k in a.all_spans():
        p = a.part(i, k)
        state, bases = a.states("saved")[span].to(a.wide), a.bases(span) if a.model else None
        d = a.gradients(p, state, bases, None, ("C", "z", "zeta", "phi", "delta", "OWN", *("theta_q",)[: a.model]))
        for index in range(f.G * f.splits):
            a.per_group("dC", p, d.C, index)
        a.array("DQ", a.U, f.tokens)[:, p.tokens] = d.delta
        a.array("DOWN", a.U, f.tokens)[:, p.tokens] = d.OWN
        if a.z is not None:
            dz = a.array("dz", a.rows, a.S, a.H, a.P)
            dz[p.row, p.here] = d.z.reshape(p.length, a.H, a.P).to(dz.dtype)
        if a.model == 2:
            _of_ranks(a, "dphi", span, d.phi)
            if a.z is not None:
                _of_ranks(a, "dzeta", span, d.zeta)
        if a.model:
            a.array("dC_bias", a.spans_all, a.U, a.R, a.N)[span] = d.C.sum(0)
            a.turned("q", p, span, d.theta_q)


def carry(a):
    f = a.f
    for i, *_ in a.sequences():
        gradient = f.L.new_zeros(a.U, a.BP, a.N) if f.dfinal is None else f.dfinal[i].reshape(a.U, a.BP, a.N)
        for span, k in reversed(a.spans_of(i)):
            a.states("carried")[span] = gradient.to(f.carried.dtype)
            state, bases = a.states("saved")[span].to(a.wide), a.bases(span) if a.model else None
            gradient = a.gradients(a.part(i, k), state, bases, gradient, ["state"]).state
            a.array("energy", a.spans_all, a.U)[span] = (state * gradient).sum((1, 2))
        if f.dstate is not None:
            f.dstate[i] = gradient.view(a.H, a.P, a.N)


def key(a):
    f = a.f
    f.spans_all = a.spans_all
    for span, i, k in a.all_spans():
        p = a.part(i, k)
        state, bases = a.states("saved")[span].to(a.wide), a.bases(span) if a.model else None
        after = a.states("carried")[span].to(a.wide)
        d = a.gradients(p, state, bases, after, ("B", "x", "psi", "W", "D", *("theta_k",)[: a.model]))
        for index in range(f.G * f.splits):
            a.per_group("dB", p, d.B, index)
        a.array("DW", a.U, f.tokens)[:, p.tokens] = d.W
        dx = a.array("dx", a.rows, a.S, a.H, a.P)
        dx[p.row, p.here] = d.x.reshape(p.length, a.H, a.P).to(dx.dtype)
        if f.dD is not None:
            a.array("dD", a.spans_all, a.H, a.P)[span] = d.D.reshape(a.H, a.P)
        if a.model == 2:
            _of_ranks(a, "dpsi", span, d.psi)
        if a.model:
            a.array("dB_bias", a.spans_all, a.U, a.R, a.N)[span] = d.B.sum(0)
            a.turned("k", p, span, d.theta_k)
    f.carried.fill_(GARBAGE)


def _of_ranks(a, name, span, gradient):
    """[U, R, BP] -> [H, R, P] of a span."""
    whole = gradient.view(a.H, a.blocks, a.R, a.BP).transpose(1, 2).reshape(a.H, a.R, a.P)
    a.array(name, a.spans_all, a.H, a.R, a.P)[span] = whole
