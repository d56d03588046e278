"""mamba-ssm's signature on our Mamba-2 scan: the same results, and a refusal of all that has no counterpart."""

import inspect
import math

import pytest
import torch

from nam56r.kernels.mamba2 import mamba2_scan
from nam56r.kernels.mamba2.combined import mamba_chunk_scan_combined

# of mamba_ssm.ops.triton.ssd_combined, 2.3.2; state_dtype came later
THEIRS = "x dt A B C chunk_size D z dt_bias initial_states seq_idx cu_seqlens dt_softplus dt_limit return_final_states"


def inputs(batch=2, rows=2, length=70):
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    x, B, C = draw(batch, length, 4, 3), draw(batch, length, 2, 5), draw(batch, length, 2, 5)
    required = (x, draw(batch, length, 4), -draw(4).exp(), B, C)
    given = {"D": draw(4), "z": draw(batch, length, 4, 3), "dt_bias": draw(4), "dt_softplus": True}
    return required, given, draw(rows, 4, 3, 5)


def test_the_signature_is_mamba_ssms():
    names = list(inspect.signature(mamba_chunk_scan_combined).parameters)
    assert names == [*THEIRS.split(), "return_varlen_states", "state_dtype", "kernel"]


@pytest.mark.parametrize("chunk_size", [1, 64, 256])
@pytest.mark.parametrize("ends", [None, [0, 30, 30, 70]])
def test_is_our_scan(chunk_size, ends):
    rows = len(ends) - 1 if ends else 2
    required, given, state = inputs(1 if ends else 2, rows)
    bounds = torch.tensor(ends) if ends else None  # int64, as torch makes it
    packed = bounds if bounds is None else bounds.int()
    wanted = mamba2_scan(*required, **given, initial_state=state, cu_seqlens=packed)
    options = given | {"initial_states": state, "cu_seqlens": bounds, "state_dtype": torch.bfloat16}
    y, final = mamba_chunk_scan_combined(*required, chunk_size, **options, return_final_states=True)
    assert torch.equal(y, wanted[0]) and torch.equal(final, wanted[1])
    alone = mamba_chunk_scan_combined(*required, chunk_size, **options, kernel="reference")
    assert torch.equal(alone, y)


def test_takes_the_limits_that_limit_nothing():
    required, given, _ = inputs()
    plain = mamba_chunk_scan_combined(*required, 64)
    assert torch.equal(mamba_chunk_scan_combined(*required, 64, dt_limit=[0, math.inf]), plain)


def test_refuses_all_at_once():
    required, given, _ = inputs()
    with pytest.raises(ValueError) as refused:
        mamba_chunk_scan_combined(
            *required, 64, **given, seq_idx=torch.zeros(2, 70), dt_limit=(0.0, 0.1), return_varlen_states=True
        )
    said = str(refused.value)
    assert said.startswith("mamba_chunk_scan_combined: seq_idx is given") and "give cu_seqlens instead" in said
    assert "dt_limit is (0.0, 0.1), but must be (0.0, inf)" in said and "return_varlen_states is True" in said
    assert "\n" not in said
