"""Fused CPU kernels: read, choose scales, round, pack and measure the error in one pass over the weight.

`quant/reference.py` is the specification; every kernel gives the same bits. Kernels release the GIL and know nothing
of threads: the caller splits a tensor by rows. Importing a kernel module imports numba.
"""
