"""Triton kernels of fastebm, imported as ``fastebm.kernels.triton``. ``import triton`` in here is the real Triton.

philox.py    the noise stream
mlp.py       activations with their slopes, products, layers
weights.py   one launch that prepares the weights for the step kernels
langevin.py  K Langevin steps of an MLP energy in one launch
update.py    noise, update and clamp in one launch, for a gradient computed elsewhere
launch.py    regime, tile, warps and stages for an architecture
"""
