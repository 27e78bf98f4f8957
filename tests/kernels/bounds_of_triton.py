"""What the Triton kernels make of bounds and reach that no CPU would take; only for a process that interprets."""

import torch
from compress.kernels.flash_decode import triton as decode
from compress.kernels.flash_prefill import triton as prefill
from compress.kernels.proofs import same_bits

LENGTH, BESIDE = 100, 60
BOUNDS = [[-40, 100], [7, 150], [90, 20], [120, 140], [-9, -3]]
CUT = [[0, 100], [7, 100], [90, 90], [100, 100], [0, 0]]


def cuts() -> dict[str, bool]:
    """Whether every kernel gives what it gives for the bounds cut to the keys; NaNs stand beside the keys."""
    generator = torch.Generator().manual_seed(0)
    memory = torch.full((2, len(BOUNDS), 1, LENGTH + 2 * BESIDE, 16), torch.nan)
    k, v = memory[:, :, :, BESIDE:-BESIDE].copy_(torch.randn(2, len(BOUNDS), 1, LENGTH, 16, generator=generator))
    found = {}
    for name, op, rows in (("prefill", prefill.flash_prefill, 70), ("decode", decode.flash_decode, 2)):
        q = torch.randn(len(BOUNDS), 2, rows, 16, generator=generator)
        for reach, cut in ((None, None), ([[4, 20]], [[4, 20]]), ([[-30, 20]], [[0, 20]])):
            pairs = [None if pair is None else torch.tensor(pair) for pair in (reach, cut)]
            wild = op(q, k, v, None, torch.tensor(BOUNDS), pairs[0])
            tame = op(q, k, v, None, torch.tensor(CUT), pairs[1])
            found[f"{name}, reach {reach}"] = same_bits(wild, tame) and not tame[0].isnan().any()
    return found
