"""Operators: torch, Triton and the compiled extension. Nothing here knows a model or Megatron.

Each family is one folder and one import: `from nam56r.kernels.m2rnn import m2rnn`. `registry` says which
implementation of an operator runs on which problem.
"""
