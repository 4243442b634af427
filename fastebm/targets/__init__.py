"""Targets: an energy as samplers see it.

Any module is one by autograd (autograd.py). An MLP, or a sum with MLPs, is also read into plain tensors
(description.py, mlp.py), from which kernels compute energies and gradients directly.
"""
