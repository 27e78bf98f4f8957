"""What Triton's interpreter makes of bfloat16, for the test that watches it; only for a process that interprets."""

import torch
from compress.kernels.triton_support import jit, tl
from torch import Tensor


@jit
def _multiply(a, b, c, UPCAST: tl.constexpr, DOT: tl.constexpr):  # type: ignore[no-untyped-def]
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    left, right = tl.load(a + 16 * i + j), tl.load(b + 16 * i + j)
    if UPCAST:
        left, right = left.to(tl.float32), right.to(tl.float32)
    if DOT:
        left = tl.dot(left, right, input_precision="ieee")
    tl.store(c + 16 * i + j, left.to(c.dtype.element_ty))


def errors() -> dict[str, float]:
    """The largest relative error of a product in bfloat16, of one in float32, and of loading and storing bfloat16."""
    a, b = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = a.double() @ b.double()
    return {
        "dot": _error(_run(a, b, torch.float32, UPCAST=False, DOT=True), exact),
        "dot of upcast operands": _error(_run(a, b, torch.float32, UPCAST=True, DOT=True), exact),
        "copy": _error(_run(a, b, torch.bfloat16, UPCAST=True, DOT=False), a.double()),
    }


def _run(a: Tensor, b: Tensor, dtype: torch.dtype, **constexprs: bool) -> Tensor:
    c = torch.empty(16, 16, dtype=dtype)
    _multiply[(1,)](a, b, c, **constexprs)
    return c


def _error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).abs().max() / exact.abs().max()).nan_to_num(float("inf")).item()
