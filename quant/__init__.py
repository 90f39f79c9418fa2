"""Numbers: quantization schemes, INT4 and FP8 kernels, packing, and the streaming pipeline."""
