"""Linear and cross-entropy on PyTorch's products and softmax, a block of the logits at a time.

Forward goes over blocks of tokens: a block's whole rows of fp32 logits give its losses and its logsumexp, which is all
that is kept (4 bytes a token). What multiplies each token's loss is known in backward only, so backward computes the
logits again. It goes over blocks of the vocabulary: with logsumexp known, softmax needs no whole row, and a block's
weight gradient is one product over all tokens, summed in fp32 inside the product and rounded once. Blocks of tokens
would need a fp32 sum of V x D instead (2 GiB at V 131072, D 4096). The hidden gradient is summed over blocks in fp32.

Work       products of 2·T·D·V FLOPs: 1 forward, 3 backward. Storing the logits would save one of the four.
Memory     forward two fp32 blocks (logits, exponentials); backward one fp32 block, its gradient in hidden's dtype, and
           T x D in fp32. A block is 2^25 logits, or more where ROWS or COLUMNS ask for it.
Traffic    between the products each logit moves 28 bytes forward and 26 backward (16-bit inputs); the hidden gradient
           is read and written once a block of the vocabulary.
Precision  on CUDA the products of 16-bit inputs give fp32 logits and sums; on a CPU each is rounded to 16 bits.
"""

from __future__ import annotations

import torch

LOGITS = 2**25  # a block of logits: 128 MiB in fp32
ROWS = 256  # at least, so that a block's product is bound by arithmetic and not by reading the weight
COLUMNS = 4096  # at least, so that adding to the hidden gradient stays small beside the product


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100, z_loss: float = 0.0
) -> torch.Tensor:
    """See `nam56r.kernels.cross_entropy.linear_cross_entropy`."""
    return _forward(hidden, weight, labels, ignore_index, z_loss)[0]


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b in fp32 (fp64 for fp64 inputs), without a rounding to 16 bits in between on CUDA."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).to(torch.promote_types(a.dtype, torch.float32))


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, where total is as `_product` gives it."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += torch.mm(a, b)


def _rows(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and logsumexp [rows] of a block of tokens."""
    logits = _product(hidden, weight.T)  # [rows, V]
    lse = logits.logsumexp(-1)
    return lse - logits.gather(1, labels[:, None])[:, 0], lse


@torch.library.custom_op("nam56r::linear_cross_entropy", mutates_args=())
def _forward(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int, z_loss: float
) -> tuple[torch.Tensor, torch.Tensor]:
    (tokens, _), vocabulary = hidden.shape, weight.shape[0]
    loss = hidden.new_empty(tokens, dtype=torch.promote_types(hidden.dtype, torch.float32))
    lse = torch.empty_like(loss)
    ignored = labels == ignore_index
    wrong = ((labels < 0) | (labels >= vocabulary)) & ~ignored
    safe = labels.clamp(0, vocabulary - 1)
    rows = max(ROWS, LOGITS // vocabulary)
    for start in range(0, tokens, rows):
        block = slice(start, start + rows)
        loss[block], lse[block] = _rows(hidden[block], weight, safe[block])
    lse.masked_fill_(wrong, torch.nan)
    if z_loss:
        loss += z_loss * lse.square()
    return loss.masked_fill_(wrong, torch.nan).masked_fill_(ignored, 0.0), lse


@_forward.register_fake
def _(hidden, weight, labels, ignore_index, z_loss):
    loss = hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
    return loss, torch.empty_like(loss)


def _columns(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    column: torch.Tensor,
    lse: torch.Tensor,
    d_target: torch.Tensor,
    d_lse: torch.Tensor,
) -> torch.Tensor:
    """Gradient [T, columns] of a block of logits, in hidden's dtype; column is the label less the block's start."""
    softmax = _product(hidden, weight.T).sub_(lse[:, None]).exp_()
    inside = (column >= 0) & (column < weight.shape[0])
    column = column.clamp(0, weight.shape[0] - 1)[:, None]
    at_label = softmax.gather(1, column)[:, 0] * d_lse + torch.where(inside, d_target, 0)
    d_logits = torch.mul(softmax, d_lse[:, None], out=torch.empty_like(softmax, dtype=hidden.dtype))
    return d_logits.scatter_(1, column, at_label[:, None].to(hidden.dtype))


@torch.library.custom_op("nam56r::linear_cross_entropy_backward", mutates_args=())
def _backward(
    d_loss: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    ignore_index: int,
    z_loss: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    d_loss = torch.where(labels == ignore_index, 0, d_loss)
    d_lse = d_loss * (1 + 2 * z_loss * lse) if z_loss else d_loss
    d_hidden = torch.zeros_like(hidden, dtype=lse.dtype, memory_format=torch.contiguous_format)
    d_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    columns = max(COLUMNS, LOGITS // max(tokens, 1))
    for start in range(0, vocabulary, columns):
        block = slice(start, start + columns)
        d_logits = _columns(hidden, weight[block], labels - start, lse, -d_loss, d_lse)
        torch.mm(d_logits.T, hidden, out=d_weight[block])
        _add_product(d_hidden, d_logits, weight[block])
        del d_logits  # before the next block's are made
    return d_hidden.to(hidden.dtype), d_weight


@_backward.register_fake
def _(d_loss, hidden, weight, labels, lse, ignore_index, z_loss):
    contiguous = torch.contiguous_format
    return torch.empty_like(hidden, memory_format=contiguous), torch.empty_like(weight, memory_format=contiguous)


def _save(ctx, inputs, output):
    hidden, weight, labels, ctx.ignore_index, ctx.z_loss = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(hidden, weight, labels, output[1])


def _differentiate(ctx, d_loss, _):
    return (*_backward(d_loss, *ctx.saved_tensors, ctx.ignore_index, ctx.z_loss), None, None, None)


_forward.register_autograd(_differentiate, setup_context=_save)
