"""What a stored tensor holds, from its bits alone: NaN, Inf, zeros. Reads at the speed of memory."""

from __future__ import annotations

from quant.kernels.bits import jit

BLOCK = 4096  # elements whose largest magnitude is looked at before any of them is counted


@jit
def scan_bits(src, mask, inf, counts):  # type: ignore[no-untyped-def]
    """Add to counts[:3] how many are NaN, Inf, zero; put the place of the first NaN or Inf in counts[3] if that is -1.

    `src` holds the bits of floats as unsigned integers, `mask` takes their sign away, `inf` is the pattern of infinity,
    above which all is NaN. For a type without infinities it is the NaN, which is then counted as Inf.
    """
    for start in range(0, src.size, BLOCK):
        block = src[start : start + BLOCK]
        largest = mask - mask
        smallest = mask
        for i in range(block.size):
            bits = block[i] & mask
            largest = max(largest, bits)
            smallest = min(smallest, bits)
        if largest < inf and smallest > 0:
            continue
        for i in range(block.size):
            bits = block[i] & mask
            if bits == 0:
                counts[2] += 1
            elif bits >= inf:
                if counts[3] < 0:
                    counts[3] = start + i
                if bits > inf:
                    counts[0] += 1
                else:
                    counts[1] += 1
