"""The decoder, its weights in and out, and the kernels that it is computed with."""
