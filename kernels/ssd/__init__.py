"""The chunked scan of Mamba-2 and Mamba-3 (state space duality, arXiv 2405.21060); the families bind it.

Both models are S_t = a_t S_{t-1} + w_t Σ_r v_{t,r} k_{t,r}ᵀ read as y_{t,r} = S_t q_{t,r}; see docs/notes/mamba.md. The
products are the kernels of csrc/ssd; what is a number a token, before and behind them, is Triton (prepare, finish).
"""
