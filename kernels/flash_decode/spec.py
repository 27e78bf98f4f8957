"""What the proofs need of `flash_decode`."""

import torch
from compress.kernels import flash_decode as op
from compress.kernels.flash_decode import reference, triton
from compress.kernels.flash_prefill.spec import case, compiled_arguments
from compress.kernels.flash_prefill.spec import exact as exact_rows
from compress.kernels.proofs import Compiled, Limits, OpSpec
from compress.kernels.triton_support import Launch
from torch import Tensor


def exact(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, bounds: Tensor | None, reach: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Row by row in float64."""
    ends = [k.shape[2]] * len(q) if bounds is None else bounds[:, 1].tolist()
    return exact_rows(q, k, v, scaling, bounds, reach, [end - q.shape[2] for end in ends])


CASES = (
    case("grouped", (3, 1), (1, 700, 64)),
    case("first-token", (4, 4), (1, 1, 80)),
    case("eight-heads", (8, 1), (1, 67, 128), scaling=0.3),
    case("a-few-tokens", (4, 1), (5, 300, 96)),
    case("most-rows", (8, 1), (8, 90, 32)),
    case("wide-head", (1, 1), (1, 260, 256)),
    case("no-rows", (2, 1), (0, 5, 64)),
    case("ragged", (2, 1), (1, 600, 64), bounds=[[0, 600], [596, 600], [0, 3], [5, 5], [10, 260]]),
    case("ragged-tokens", (2, 1), (3, 70, 32), bounds=[[0, 70], [60, 62], [4, 4]]),
    case("sink-and-window", (4, 4), (1, 520, 16), reach=[[4, 30], [0, 1], [600, 5], [0, 600]]),
    case("ragged-window", (2, 2), (3, 600, 32), bounds=[[130, 600], [3, 120]], reach=[[5, 20], [2, 500]]),
)


def _compiled(
    width: int, dtype: torch.dtype, part: int, limits: Limits, narrowed: bool = False, tokens: int = 1
) -> Compiled:
    def launch() -> Launch:
        return triton.launches(*compiled_arguments(tokens, 32768, width, dtype, narrowed))[1][part]

    kind = f"{('split', 'merge')[part]}{'' if tokens == 1 else f'-r{4 * tokens}'}"
    name = f"{kind}-d{width}-{str(dtype).removeprefix('torch.')}{'-narrowed' if narrowed else ''}"
    return Compiled(name, launch, limits)


SPEC = OpSpec(
    name="flash_decode",
    public=op.flash_decode,
    reference=reference.flash_decode,
    exact=exact,
    triton=triton.flash_decode,
    cases=CASES,
    configurations=(
        _compiled(64, torch.float16, 0, Limits(registers=128)),
        _compiled(96, torch.float16, 0, Limits(registers=128)),
        _compiled(128, torch.bfloat16, 0, Limits(registers=128)),
        _compiled(128, torch.float16, 0, Limits(registers=128), narrowed=True),
        _compiled(256, torch.bfloat16, 0, Limits(registers=168)),
        _compiled(64, torch.float32, 0, Limits(mma=False)),
        _compiled(64, torch.float16, 0, Limits(wgmma=True), tokens=16),
        _compiled(128, torch.float16, 0, Limits(wgmma=True), tokens=16),
        _compiled(64, torch.float16, 0, Limits(), narrowed=True, tokens=8),
        _compiled(128, torch.bfloat16, 0, Limits(), narrowed=True, tokens=8),
        _compiled(256, torch.bfloat16, 0, Limits(wgmma=True), tokens=16),
        _compiled(128, torch.float32, 0, Limits(mma=False), narrowed=True),
        _compiled(128, torch.float32, 0, Limits(mma=False), tokens=8),
        _compiled(128, torch.float32, 0, Limits(mma=False), tokens=16),
        _compiled(256, torch.float32, 0, Limits(mma=False)),
        _compiled(256, torch.float32, 0, Limits(mma=False), tokens=16),
        _compiled(128, torch.float16, 1, Limits(registers=64, mma=False)),
        _compiled(256, torch.bfloat16, 1, Limits(registers=64, mma=False)),
    ),
)
