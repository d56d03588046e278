"""The three kernels of csrc/ssd in plain PyTorch, any dtype: what each reads and writes, from the fields that it gets.

A span is one differentiable function of everything in it; what `gradient` writes are its gradients. Heads are units
here: a head's P columns in blocks of at most 64.
"""

import math
from types import SimpleNamespace

import torch

from nam56r.kernels.ssd.cuda import FIELDS

GARBAGE = 7.0  # in scratch memory, whose content means nothing


def launch(kernels, sizes, fields):
    """Stands for nam56r.kernels.ssd.cuda.launch."""
    for kernel in kernels:
        if kernel != "turns":  # walk and gradient make their own
            {"forward": forward, "walk": walk, "gradient": gradient}[kernel](Problem(sizes, fields))


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

    def chunks_of(self, i):
        return -(-self.sequences()[i][3] // self.CT)

    def in_segment(self, i):
        """The chunks of sequence i that lie in this segment, by their numbers in the sequence."""
        f, before = self.f, 0 if self.f.cu is None else self.first_span(i)
        begin, end = f.segment - before, f.segment + f.segment_spans - before
        return range(max(0, begin) * f.every, min(self.chunks_of(i), end * f.every))

    def place(self, i, chunk):
        """Where `states` and `carried` have a chunk of a sequence."""
        f = self.f
        return ((i * f.segment_spans if f.cu is None else self.first_span(i)) - f.segment) * f.every + chunk

    def part_number(self, i, segment):
        return i * self.f.segments + segment if self.f.cu is None else i + segment

    def spans(self):
        """(place, span, sequence, number in it) of the segment, as gradient's grid sees them."""
        f, places = self.f, []
        for place in range(f.segment_spans * (1 if f.cu is not None else f.sequences)):
            if f.cu is None:
                i, k = place // f.segment_spans, f.segment + place % f.segment_spans
            else:
                number = f.segment + place
                i = f.sequence_of[number].item() if number < f.spans else f.sequences
                k = number - self.first_span(i)
            if i < f.sequences and k * f.every < self.chunks_of(i):
                places.append((place, self.first_span(i) + k, i, k))
        return places

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
        p.z, p.dy = (None if t is None else self.unit(t[row, here]).to(self.wide) for t in (self.z, self.dy))
        p.psi, p.zeta, p.phi = (self.ranks(t) if self.model == 2 else None for t in (f.psi, f.zeta, f.phi))
        if self.model == 2 and self.z is None:
            p.zeta = None
        p.D = p.x.new_zeros(self.U, self.BP)
        if f.D is not None:
            p.D = p.D + self.unit(f.D.as_strided((self.H, self.P), (f.d_h, f.d_p)))
        plane = self.H, f.tokens
        numbers = (self.array(name, *plane)[:, all_here] for name in ("L", "W", "OWN", "DT"))
        p.L, p.W, p.OWN, p.DT = map(self.by_unit, numbers)
        p.read = p.pairs = p.write = torch.zeros_like(p.L)  # to be differentiated by
        if self.model:
            p.tanh = self.angles[row, here].transpose(0, 1)  # [H, l, NA]
            p.turn = self.by_unit(p.tanh * math.pi) * p.DT[..., None]
            p.theta = torch.zeros_like(p.turn)
        return p

    def chunks(self, p):
        return [slice(at, min(at + self.CT, p.length)) for at in range(0, p.length, self.CT)]

    def base(self, i, chunk):
        """Radians before a chunk: [U, NA]"""
        return self.by_unit(self.f.bases[self.first_span(i) * self.f.every + chunk] * 2 * math.pi)

    def rotate(self, t, angle):
        """t [l, U, R, N] turned by angle [U, l, NA]: complex numbers."""
        turn = torch.polar(torch.ones_like(angle), angle).transpose(0, 1)[:, :, None]
        half = t.unflatten(-1, (-1, 2)) if self.model == 1 else t.unflatten(-1, (2, -1)).mT
        numbers = torch.view_as_complex(half.contiguous())
        numbers = torch.cat((numbers[..., : self.NA] * turn, numbers[..., self.NA :]), -1)
        parts = torch.view_as_real(numbers)
        return (parts if self.model == 1 else parts.mT).flatten(-2)

    def run(self, p, c, state, base):
        """Of the chunk that is the slice c of p: y [l, U, BP], the state at its end, the last k and v."""
        q, k = p.C[c], p.B[c]
        if self.model:
            angle = base[:, None] + p.turn[:, c].cumsum(1) + p.theta[:, c]
            q, k = self.rotate(q, angle), self.rotate(k, angle)
        v = p.x[c][:, :, None] * (p.psi if self.model == 2 else 1)
        L, w = p.L[:, c], p.W[:, c]
        below = (L + p.pairs[:, c])[:, :, None] - L[:, None, :]
        earlier = torch.ones_like(below, dtype=torch.bool).tril(-1)
        mix = below.masked_fill(~earlier, -torch.inf).exp() * w[:, None, :] + torch.diag_embed(p.OWN[:, c])
        scores = torch.einsum("turn,suon->utrso", q, k) * mix[:, :, None, :, None]
        y = torch.einsum("utrso,suop->turp", scores, v)
        y = y + torch.einsum("turn,upn,ut->turp", q, state, (L + p.read[:, c]).exp())
        y = y + p.D[:, None] * v
        if p.phi is not None:
            y = y * p.phi
        if p.z is not None:
            gate = p.z[c][:, :, None] * (1 if p.zeta is None else p.zeta)
            y = y * gate * torch.sigmoid(gate)
        grown = (L[:, -1:] - L).exp() * (w + p.write[:, c])
        state = L[:, -1].exp()[:, None, None] * state + torch.einsum("us,surp,surn->upn", grown, v, k)
        return y.sum(2), state, k[-1], v[-1]

    def gradients(self, p, befores, bases, afters, names):
        """Of Σ dy y + Σ <the state at a chunk's end, its gradient>, by the named leaves of p."""
        with torch.enable_grad():
            leaves = {name: getattr(p, name).clone().requires_grad_() for name in names if getattr(p, name) is not None}
            changed = SimpleNamespace(**vars(p) | leaves)
            loss = 0
            for c, before, base, after in zip(self.chunks(p), befores, bases, afters, strict=True):
                y, state, *_ = self.run(changed, c, before, base)
                loss = loss + (p.dy[c] * y).sum() + (after * state).sum()
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return SimpleNamespace(**dict(zip(leaves, found)))

    def states(self, name):
        """[parts, U, BP, N] of saved"""
        t = getattr(self.f, name)
        return t.view(t.shape[0], self.U, self.BP, self.N)

    def scratch(self, name, i, chunk):
        """[U, BP, N] of a chunk in states or carried: a layout of its own."""
        rows = getattr(self.f, name)[self.place(i, chunk)]
        return rows[:, : self.BP * self.N].view(self.U, self.N, self.BP).mT

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

    def turned(self, p, span, theta):
        """ddt_turned, dangle_sum, total from theta [U, l, NA], the angles' gradients."""
        f, tokens = self.f, self.f.tokens
        total = self.array("total", self.all_spans * f.every, self.U, self.NA)
        ddt = self.array("ddt_turned", self.U, tokens)
        dangle = self.array("dangle_sum", f.G * f.splits if f.angle_heads == 1 else self.U, tokens, self.NA)
        for j, c in enumerate(self.chunks(p)):
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

    def whole(self, t):
        """[U, rest, BP] -> [H, rest, P]"""
        return t.unflatten(0, (self.H, self.blocks)).movedim(1, -2).flatten(-2)

    @property
    def all_spans(self):
        return self.f.spans * (self.f.sequences if self.f.cu is None else 1)


def forward(a):
    f = a.f
    for i, row, first, length, _ in a.sequences():
        state = f.L.new_zeros(a.U, a.BP, a.N) if f.state is None else f.state[i].view(a.U, a.BP, a.N)
        turns = f.L.new_zeros(a.H, a.NA, dtype=torch.float64)
        if a.model and f.angle is not None:
            turns = (f.angle[i].double() / (2 * math.pi)) % 1
        part, before = None, 0 if f.cu is None else a.first_span(i)
        for chunk in range(a.chunks_of(i)):
            if f.save:
                was, part = part, a.part_number(i, (before + chunk // f.every) // f.segment_spans)
                if part != was:
                    a.states("saved")[part] = state.to(f.saved.dtype)
                if a.model:
                    f.bases[a.first_span(i) * f.every + chunk] = turns
            p = a.part(i, chunk, chunks=1)
            y, state, k, v = a.run(p, slice(None), state, a.by_unit((turns * 2 * math.pi).to(a.wide)))
            a.array("y", a.rows, a.S, a.H, a.P)[row, p.here] = y.reshape(p.length, a.H, a.P).to(f.y.dtype)
            if a.model:
                turns = (turns + p.turn[:: a.blocks].sum(1) / (2 * math.pi)) % 1
        f.final[i] = state.view(a.H, a.P, a.N)
        if a.model and length:
            f.final_k[i] = k[:: a.blocks]
            f.final_v[i] = a.whole(v)
            f.final_angle[i] = turns * 2 * math.pi


def walk(a):
    f = a.f
    f.states.fill_(GARBAGE), f.carried.fill_(GARBAGE)
    for i, *_ in a.sequences():
        inside, steps = a.in_segment(i), []
        if inside:
            state = a.states("saved")[a.part_number(i, f.segment // f.segment_spans)].to(a.wide)
        for chunk in inside:
            a.scratch("states", i, chunk).copy_(state)
            p, before = a.part(i, chunk, chunks=1), state.clone().requires_grad_()
            with torch.enable_grad():
                y, end, *_ = a.run(p, slice(None), before, a.model and a.base(i, chunk))
            steps.append((chunk, p, before, y, end))
            state = end.detach()
        ends = inside.stop == a.chunks_of(i) if inside else not a.chunks_of(i) and f.segment == 0
        if ends:
            f.dstate[i] = 0 if f.dfinal is None else f.dfinal[i]
        after = f.dstate[i].view(a.U, a.BP, a.N)
        for chunk, p, before, y, end in reversed(steps):
            a.scratch("carried", i, chunk).copy_(after)
            if chunk == 0:
                energy = a.array("energy", a.all_spans * f.every, a.U)
                energy[a.first_span(i) * f.every] = p.L[:, -1].exp() * (before.detach() * after).sum((1, 2))
            (after,) = torch.autograd.grad([y, end], before, [p.dy, after])
        if inside:
            f.dstate[i] = after.view(a.H, a.P, a.N)


def gradient(a):
    f = a.f
    leaves = [
        "B",
        "C",
        "x",
        "z",
        "psi",
        "zeta",
        "phi",
        "D",
        "read",
        "pairs",
        "write",
        "OWN",
        "W",
        *["theta"] * (a.model > 0),
    ]
    by_token = {"READ": "read", "PAIRS": "pairs", "WRITE": "write", "DOWN": "OWN", "DW": "W"}
    for place, span, i, k in a.spans():
        p = a.part(i, k)
        chunks = range(k * f.every, k * f.every + len(a.chunks(p)))
        befores, afters = ([a.scratch(name, i, at).to(a.wide) for at in chunks] for name in ("states", "carried"))
        d = a.gradients(p, befores, [a.model and a.base(i, at) for at in chunks], afters, leaves)
        for index in range(f.G * f.splits):
            a.per_group("dB", p, d.B, index)
            a.per_group("dC", p, d.C, index)
        for name, leaf in by_token.items():
            a.array(name, a.U, f.tokens)[:, p.tokens] = getattr(d, leaf)
        for j, (c, before, after) in enumerate(zip(a.chunks(p), befores, afters)):
            if k or j:  # else walk did it
                passing = p.L[:, c][:, -1].exp() * (before * after).sum((1, 2))
                a.array("energy", a.all_spans * f.every, a.U)[span * f.every + j] = passing
        for name, found in (("dx", d.x), ("dz", getattr(d, "z", None))):
            if found is not None:
                to = a.array(name, a.rows, a.S, a.H, a.P)
                to[p.row, p.here] = found.reshape(p.length, a.H, a.P).to(to.dtype)
        if f.dD is not None:
            f.dD[place] += d.D.reshape(a.H, a.P)
        if a.model:
            for to, t in ((f.dB_bias, d.B), (f.dC_bias, d.C)):  # a rank's rows are summed by whoever reads them
                to[place].unflatten(1, (a.R, -1))[:, :, 0] += t.sum(0)
            a.turned(p, span, d.theta)
        for name in ("psi", "zeta", "phi") if a.model == 2 else ():
            if name != "zeta" or a.z is not None:
                getattr(f, f"d{name}")[place] += a.whole(getattr(d, name))
    f.states.fill_(GARBAGE), f.carried.fill_(GARBAGE)
