"""NAM56R's layers as Megatron-core modules. The only package that imports Megatron's model code.

A module here projects, calls kernels and projects back; it holds no mathematics of its own. Which kernel it calls is
its `kernels` attribute (operator -> name), which `stack.Stack` takes from the plan's slot; an operator that isn't in
it is chosen by `nam56r.kernels.registry.select` from the call.
"""
