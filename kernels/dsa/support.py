"""The kernels of the sparse-attention operators, best first."""

from __future__ import annotations

from functools import partial

from nam56r.kernels.dsa import cuda, reference, triton, triton_loss
from nam56r.kernels.registry import Kernel

KERNELS = (
    Kernel("index_top_k", "cuda", cuda.index_top_k, cuda.refuses),
    Kernel("index_top_k", "cuda_fp8", cuda.index_top_k_fp8, cuda.refuses, role="rounding"),
    Kernel("index_top_k", "reference", reference.index_top_k, role="development"),
    Kernel("sparse_latent_attention", "triton", triton.sparse_latent_attention, triton.refuses),
    Kernel(
        "sparse_latent_attention", "triton_atomic", partial(triton.sparse_latent_attention, atomic=True), triton.refuses
    ),
    Kernel("sparse_latent_attention", "reference", reference.sparse_latent_attention, role="development"),
    Kernel("indexer_kl_loss", "triton", triton_loss.indexer_kl_loss, triton_loss.refuses),
    Kernel("indexer_kl_loss", "triton_atomic", partial(triton_loss.indexer_kl_loss, atomic=True), triton_loss.refuses),
    Kernel("indexer_kl_loss", "reference", reference.indexer_kl_loss, role="development"),
)
