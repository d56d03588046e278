"""NAM56R: train hybrid models in Megatron on kernels that a plan picks slot by slot."""
