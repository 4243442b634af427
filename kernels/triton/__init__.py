"""Triton kernels of fastebm, imported as ``fastebm.kernels.triton``. ``import triton`` in here is the real Triton.

Kernels:
resident.py     K Langevin steps of an MLP energy in one launch, weights and states on the chip
streaming.py    the same where the first layer does not fit
evaluate.py     energy and gradient of a batch of states in one launch, for samplers whose steps run in PyTorch
update.py       noise, update and clamp in one launch, for a gradient computed elsewhere
weights.py      one launch that prepares the weights for the first three

What they share:
step.py         parts of a step, and the update itself
mlp.py          the layers of an MLP: energy and gradient
activations.py  activations with their slopes
products.py     products on tensor cores at each precision
parking.py      operands and slopes that wait in memory instead of registers
tiles.py        where the chains and dims of a tile lie, in memory and in registers
philox.py       the noise stream

launch.py       regime, tile, warps and stages for an architecture; needs no Triton
"""
