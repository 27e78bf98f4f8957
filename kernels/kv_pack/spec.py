"""What the proofs need to know of `kv_pack`.

Rounding decides between two codes; where float32 can't know the side, two right answers differ. Cases therefore leave
out tokens that come closer to a tie than float32 is sure of, and then every path must give the very same codes.
"""

from collections.abc import Callable
from typing import Any

import torch
from compress.kernels import kv_pack as op
from compress.kernels import native
from compress.kernels.kv_pack import cpu, reference, triton
from compress.kernels.proofs import DTYPES, Case, Compiled, Limits, OpSpec
from compress.kernels.triton_support import Launch
from torch import Tensor

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
SURE = 1e-4  # of a code's step, and of an error; float32 is wrong by some 3e-5 at 8 bits
SURE_HALF = 1e-3  # of a float16's last place, of which float32's is 1.2e-4

Arguments = tuple[Tensor, int, Tensor | None, bool, bool]


def exact(x: Tensor, bits: int, channels: Tensor | None, clip: bool, per_token: bool) -> tuple[Tensor, ...]:
    """Bytes, parameters and values, from the nearest of all levels in float64."""
    codes, params, _ = _solved(x, bits, channels, clip, per_token)
    codes = _meaningful(codes, params) if per_token else codes
    width = x.shape[3]
    if bits == 8:
        return codes.double(), params, params * codes
    c, mu = _vectors(x, channels)
    parts = 8 // bits
    byte = sum(codes[..., p * width // parts : (p + 1) * width // parts] * 2 ** (bits * p) for p in range(parts))
    if not per_token:
        return byte.double(), c * codes + mu
    return byte.double(), params, c * (params[..., :1] * codes + params[..., 1:]) + mu


def _solved(
    x: Tensor, bits: int, channels: Tensor | None, clip: bool, per_token: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``[B, H, T, D]``, parameters, and whether float32 must find the same ``[B, H, T]``."""
    if bits == 8:
        step, sure = _half(x.double().abs().amax(-1, keepdim=True) / 127)
        codes, clear = _nearest(x.double() / torch.where(step == 0, 1.0, step), -127, 127)
        return codes, step, (sure & clear)[..., 0]
    c, mu = _vectors(x, channels)
    y = (x.double() - mu) / c
    most = 2**bits - 1
    if not per_token:
        codes, clear = _nearest(y, 0, most)
        return codes, torch.empty(0), clear[..., 0]
    low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
    found, all_clear = [], torch.ones(x.shape[:3], dtype=torch.bool)
    for ratio in RATIOS if clip else RATIOS[:1]:
        least = low if ratio == 1 else (high + low) / 2 - ratio * (high - low) / 2
        step, sure = _half((ratio * (high - low) / most).clamp(min=2.0**-24))
        zero, zero_sure = _half(least)
        codes, clear = _nearest((y - zero) / step, 0, most)
        lost = ((c * (codes * step + zero - y)) ** 2).sum(-1)
        found.append((lost, codes, torch.cat([step, zero], -1)))
        all_clear &= (sure & zero_sure & clear)[..., 0]
    losses = torch.stack([lost for lost, _, _ in found])
    best = losses.argmin(0)[..., None]
    if clip:
        first, second = losses.sort(0).values[:2]
        all_clear &= (second - first >= SURE * second) | (second == 0)
    pick = [torch.stack([one[i] for one in found]) for i in (1, 2)]
    codes, params = (torch.take_along_dim(all_of, best.expand_as(all_of[0])[None], 0)[0] for all_of in pick)
    return codes, params, all_clear


def _meaningful(codes: Tensor, params: Tensor) -> Tensor:
    """Without codes of tokens whose parameters aren't finite: those stand for no number."""
    return codes.masked_fill(~params.isfinite().all(-1, keepdim=True), 0)


def _vectors(x: Tensor, channels: Tensor | None) -> tuple[Tensor, Tensor]:
    if channels is None:
        return torch.ones(x.shape[3], dtype=torch.float64), torch.zeros(x.shape[3], dtype=torch.float64)
    return channels.double()[:, :, :1], channels.double()[:, :, 1:]


def _nearest(numbers: Tensor, least: int, most: int) -> tuple[Tensor, Tensor]:
    """The nearest of all codes, and whether all of a token's are clear of a tie."""
    distances = (numbers[..., None] - torch.arange(least, most + 1)).abs()
    near, codes = distances.topk(2, dim=-1, largest=False)
    return codes[..., 0] + least, (near[..., 1] - near[..., 0] > 2 * SURE).all(-1, keepdim=True)


def _half(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """As float16, and whether they are clear of a tie."""
    kept = numbers.half().double()
    place = torch.exp2(numbers.abs().clamp(min=2.0**-14).log2().floor() - 10)
    return kept, 0.5 - (numbers - kept).abs() / place > SURE_HALF


def _case(
    name: str,
    shape: tuple[int, int, int, int],
    bits: int,
    channels: str = "separable",
    clip: bool = False,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Case:
    """Channels of very different size, as a model's; the first tokens are all zeros and all ones.

    ``channels``: "separable", from the root of their largest; "own", steps and minima of half of the tokens, so that
    the others are clamped; "none".
    """

    def make(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
        batch, heads, count, width = shape
        sizes = torch.randn(batch, 1, heads, width, generator=generator).exp()
        x = torch.randn(batch, 3 * count, heads, width, generator=generator) * sizes
        x[:, :1], x[:, 1:2] = 0.0, 1.0
        x = x.to(dtype).transpose(1, 2)  # tokens before heads, as a projection leaves them
        vectors = None
        if channels == "separable":
            vectors = torch.stack([x.float().abs().amax(2).sqrt(), x.float().mean(2)], 2).half()
        elif channels == "own":
            low, high = x[:, :, ::2].float().aminmax(dim=2)
            vectors = torch.stack([(high - low) / (2**bits - 1), low], 2)
        if not count:
            return x, bits, vectors, clip, channels != "own"
        clear = _solved(x, bits, vectors, clip, channels != "own")[2]
        order = (~clear).byte().argsort(dim=-1, stable=True)[..., :count]
        return x.gather(2, order[..., None].expand(-1, -1, -1, width)), bits, vectors, clip, channels != "own"

    return Case(name, make, dtypes)


def _not_finite(name: str, bits: int, clip: bool = False) -> Case:
    """Tokens that hold a NaN, an infinity or both beside a token that must not suffer from them."""

    def make(generator: torch.Generator, dtype: torch.dtype) -> Arguments:
        x, *others = _case(name, (1, 1, 6, 80), bits, "none", clip).make(generator, dtype)
        x = x.clone()
        for token, values in enumerate(((torch.nan,), (torch.inf,), (-torch.inf,), (torch.inf, torch.nan))):
            x[0, 0, token, 79 - 40 * token // 3 : 79 - 40 * token // 3 + len(values)] = torch.tensor(values)
        x[0, 0, 4, 3] = torch.nan
        return x, *others

    return Case(name, make)


def _with_values(pack: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[..., tuple[Tensor, ...]]:
    """Codes, parameters where there are any, and what they unpack to."""

    def run(x: Tensor, bits: int, channels: Tensor | None, clip: bool, per_token: bool) -> tuple[Tensor, ...]:
        codes, params = pack(x, bits, channels, clip, per_token)
        codes = codes if params is None else _meaningful(codes, params)
        values = op.kv_unpack(codes, params, bits, channels)
        return (codes, values) if params is None else (codes, params, values)

    return run


def _compiled(name: str, width: int, bits: int, dtype: torch.dtype, **choices: Any) -> Compiled:
    def launch() -> Launch:
        x = torch.empty(1, 8, 4096, width, dtype=dtype, device="meta")
        channels = None if bits == 8 else torch.empty(1, 8, 2, width, dtype=torch.float16, device="meta")
        return triton.launches(x, bits, channels, choices.get("clip", False), choices.get("per_token", True))[1]

    return Compiled(name, launch, Limits(registers=168 if choices.get("clip") else 128, mma=False, conversions=0))


def _native(build: str, x: Tensor, bits: int, channels: Tensor | None, clip: bool, per_token: bool) -> Any:
    library = native.built(build)
    assert library is not None

    def packed(x: Tensor, bits: int, channels: Tensor | None, clip: bool, per_token: bool) -> Any:
        return cpu.kv_pack(x, bits, channels, (clip, per_token), library)

    return _with_values(packed)(x, bits, channels, clip, per_token)


SPEC = OpSpec(
    name="kv_pack",
    public=_with_values(op.kv_pack),
    reference=_with_values(reference.kv_pack),
    exact=exact,
    triton=_with_values(triton.kv_pack),
    cpu=_native,
    cases=(
        _case("four-bits", (2, 2, 19, 64), 4),
        _case("four-bits-wide", (1, 1, 9, 256), 4, "none"),
        _case("two-bits", (1, 2, 5, 80), 2),
        _case("two-bits-clipped", (2, 1, 18, 128), 2, clip=True),
        _case("two-bits-clipped-plain", (1, 3, 5, 96), 2, "none", clip=True),
        _case("one-token", (1, 1, 1, 128), 2, clip=True),
        _case("four-bits-by-channel", (1, 2, 7, 80), 4, "own"),
        _case("two-bits-by-channel", (1, 1, 33, 96), 2, "own"),
        _case("eight-bits", (2, 1, 7, 80), 8, "none"),
        _not_finite("not-finite", 4),
        _not_finite("not-finite-clipped", 2, clip=True),
        _not_finite("not-finite-eight-bits", 8),
        _case("no-token", (1, 2, 0, 64), 4, "none", dtypes=(torch.float32,)),
        _case("no-token-eight-bits", (1, 2, 0, 64), 8, "none", dtypes=(torch.float32,)),
    ),
    configurations=(
        _compiled("b4-d128-float16", 128, 4, torch.float16),
        _compiled("b2-d128-clipped-float16", 128, 2, torch.float16, clip=True),
        _compiled("b2-d64-clipped-bfloat16", 64, 2, torch.bfloat16, clip=True),
        _compiled("b2-d80-float16", 80, 2, torch.float16),
        _compiled("b2-d128-by-channel-bfloat16", 128, 2, torch.bfloat16, per_token=False),
        _compiled("b8-d64-float16", 64, 8, torch.float16),
    ),
    tolerances=dict.fromkeys(DTYPES, 1e-6),
)
