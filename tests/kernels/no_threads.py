"""What asks for threads gives the same where there are none: a thread's stack is larger than the memory that is left.

Started by ``test_native.py`` under ``ulimit -s``, with the bytes that are left as its argument; prints "equal" for each
operation, or is killed by an exception that leaves C++.
"""

import resource
import sys
import threading
from pathlib import Path

import torch
from compress.kernels import native
from compress.kernels.quant_linear import cpu, from_codes
from compress.kernels.segment_attention.cpu import Prepared
from compress.kernels.segment_attention.segment import Segment


def _linear(threads: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (200, 64), dtype=torch.uint8, generator=generator)
    weight = from_codes(codes, torch.rand(200, 2, generator=generator).half(), None, 4, 32, "rows")
    return cpu.quant_linear(torch.randn(3, 64, generator=generator), weight, threads=threads)


def _attention(threads: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, rows, 16, generator=generator) for rows in (1, 30, 30))
    bounds = torch.tensor([[0, 30], [3, 20]], dtype=torch.int32)[:, None].expand(2, 4, 2)
    whole = Segment(k, v, 16, 16, None, None, None, None, bounds, 30)
    build = native.library()
    assert build is not None
    return Prepared([whole], build, threads)(q, 0.25)[0]


def main() -> None:
    """Both operations by one thread, then by eight that can't be had."""
    alone = _linear(1), _attention(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + int(sys.argv[1]),) * 2)
    try:
        threading.Thread(target=print, args=("a thread was to be had",)).start()
    except RuntimeError:
        for name, once, found in zip(("linear", "attention"), alone, (_linear(8), _attention(8)), strict=True):
            print(name, "equal" if torch.equal(once, found) else "differs")


if __name__ == "__main__":
    main()
