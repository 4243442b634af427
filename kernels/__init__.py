"""Kernels of fastebm, imported as ``fastebm.kernels``.

triton/   for GPUs, in Triton
cpu/      for CPUs, in Numba

Where both have an operation, it has the same name in both.
"""

if __name__ == "kernels":
    raise ImportError("import fastebm.kernels, not the folder `kernels`: install the project with pip install -e .")
