"""Kernels of fastebm, imported as ``fastebm.kernels``: in Triton here, and in Numba for a CPU in ``cpu``.

philox.py    the noise stream on the device
mlp.py       activations with their slopes, and the way through the layers
weights.py   the weights as the step kernels read them, made in one launch
langevin.py  K Langevin steps of an MLP energy in one launch, in two regimes
update.py    noise, update and clamp in one launch, for a gradient computed elsewhere
launch.py    regime, tile, warps and stages for an architecture's dims
"""

if __name__ == "kernels":
    raise ImportError("import fastebm.kernels, not the folder `kernels`: install the project with pip install -e .")
