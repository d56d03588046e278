"""Argument checks that name the argument, what it was and what it must be. They read shapes only, never data."""

from __future__ import annotations

import torch


class Shapes:
    """Binds letters to sizes over an operator's arguments and refuses the first that disagrees.

        sizes = Shapes("m2rnn")
        sizes.bind("q", q, "B S Hq K")
        sizes.bind("k", k, "B S Hk K")     # ValueError: m2rnn: k is [2, 7, 1, 64], but must be [B=2, S=8, Hk, K=64]
        sizes["K"]

    A number in the shape ("B 1 N") must be met exactly. All tensors bound must be on one device.
    """

    def __init__(self, operator: str, **sizes: int):
        self.operator, self.sizes = operator, sizes
        self.device: torch.device | None = None

    def __getitem__(self, letter: str) -> int:
        return self.sizes[letter]

    def bind(
        self,
        name: str,
        tensor: torch.Tensor | None,
        shape: str,
        dtypes: tuple[torch.dtype, ...] | None = None,
        *,
        optional: bool = False,
    ) -> None:
        """Check one argument. dtypes lists what is allowed; optional lets None pass."""
        if tensor is None and optional:
            return
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{self.operator}: {name} is {type(tensor).__name__}, but must be a tensor [{shape}]")
        letters = shape.split()
        want = [int(x) if x.isdigit() else self.sizes.get(x) for x in letters]
        fits = tensor.ndim == len(letters) and all(w in (None, s) for w, s in zip(want, tensor.shape))
        if not fits:
            shown = ", ".join(x if w is None or x.isdigit() else f"{x}={w}" for x, w in zip(letters, want))
            raise ValueError(f"{self.operator}: {name} is {list(tensor.shape)}, but must be [{shown}]")
        if dtypes and tensor.dtype not in dtypes:
            allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise TypeError(
                f"{self.operator}: {name} is {str(tensor.dtype).removeprefix('torch.')}, but must be {allowed}"
            )
        if self.device is None:
            self.device = tensor.device
        elif tensor.device != self.device:
            raise ValueError(
                f"{self.operator}: {name} is on {tensor.device}, but the arguments before it on {self.device}"
            )
        self.sizes.update(
            zip((x for x in letters if not x.isdigit()), (s for x, s in zip(letters, tensor.shape) if not x.isdigit()))
        )

    def divides(self, part: str, whole: str) -> None:
        """Size `part` must divide size `whole` (shared heads, groups)."""
        if self[part] == 0 or self[whole] == 0 or self[whole] % self[part]:
            raise ValueError(f"{self.operator}: {part} = {self[part]} must divide {whole} = {self[whole]}")

    def packed(self, cu_seqlens: torch.Tensor | None) -> int:
        """Check cu_seqlens ([n + 1] int32, B = 1) and give the number of sequences: n, or B without it.

        On a CPU its values are checked too (from 0, never falling, up to S); on CUDA that would wait for the device.
        """
        if cu_seqlens is None:
            return self["B"]
        self.bind("cu_seqlens", cu_seqlens, "n+1", (torch.int32,))
        if self["B"] != 1:
            raise ValueError(
                f"{self.operator}: cu_seqlens packs sequences into one row, so B must be 1, not {self['B']}"
            )
        if cu_seqlens.numel() < 1:
            raise ValueError(f"{self.operator}: cu_seqlens is empty, but must be [0, …, S]")
        if cu_seqlens.numel() == 1 and self["S"]:
            raise ValueError(f"{self.operator}: cu_seqlens holds no sequence, but there are S = {self['S']} rows")
        if cu_seqlens.device.type == "cpu":
            ends = cu_seqlens.tolist()
            if ends[0] != 0 or ends[-1] != self["S"] or sorted(ends) != ends:
                raise ValueError(f"{self.operator}: cu_seqlens is {ends}, but must rise from 0 to S = {self['S']}")
        return cu_seqlens.numel() - 1


FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def one_of(operator: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    """An option must be one of the allowed values."""
    if value not in allowed:
        raise ValueError(f"{operator}: {name} is {value!r}, but must be one of {', '.join(map(repr, allowed))}")


def needs_gradient(*inputs: object) -> bool:
    """Whether autograd will ask for a gradient of any: what is not a tensor has none."""
    return torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in inputs)
