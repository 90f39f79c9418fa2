"""CPU kernels of the layouts: turning matrices. They release the GIL; the caller splits the work. Imports numba."""
