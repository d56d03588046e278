"""The kernels of the sparse-attention operators, best first."""

from __future__ import annotations

from nam56r.kernels.dsa import reference
from nam56r.kernels.registry import Kernel

KERNELS = (
    Kernel("index_top_k", "reference", reference.index_top_k, role="development"),
    Kernel("sparse_latent_attention", "reference", reference.sparse_latent_attention, role="development"),
    Kernel("indexer_kl_loss", "reference", reference.indexer_kl_loss, role="development"),
)
