"""Dynamic sparse attention: producers of block lists, which compress.kernels.block_attention attends by."""
