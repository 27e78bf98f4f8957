"""Dynamic sparse attention: producers of block lists, which the kernels attend by (compress.kernels.block_attention)."""
