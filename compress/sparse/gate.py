"""From which length on searching for tokens is faster than attending all of them: measured once a machine and shape."""

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from platformdirs import user_cache_path
from torch import Tensor

from compress.kernels import native
from compress.kernels.block_attention import block_attention
from compress.plan import Search, TopK
from compress.sparse.finder import finder
from compress.sparse.sea import Estimator, Shape

LENGTHS = (2048, 4096, 8192, 16384)
GPU_GATE = 8192  # tokens; not measured: where dense attention is fast, published figures break even here
MARGIN = 0.98  # sparse attention has to take less than this share of dense attention's time


@dataclass(frozen=True)
class Heads:
    """Query heads, KV heads and head size of a layer."""

    query: int
    kv: int
    width: int


def gate_of(topk: TopK, search: Search, heads: Heads, folder: Path | None = None, shape: Shape | None = None) -> int:
    """Tokens up to which attention is dense.

    Args:
        topk: policy and tokens.
        search: how; its own gate, if it has one, is taken.
        heads: of the model.
        folder: where what was measured is kept; the user's cache folder by default.
        shape: of the estimator, for the policy ``sea``.

    Returns:
        At least what sink, window and list hold together. Where no length of `LENGTHS` is faster, a length that no text
        has.
    """
    least = search.sink + search.window + topk.k
    if search.gate is not None:
        return max(least, search.gate)
    if torch.cuda.is_available():
        return max(least, GPU_GATE)
    place = (
        (user_cache_path("compress") if folder is None else folder)
        / "gates"
        / f"{_key(topk, search, heads, shape)}.json"
    )
    if place.exists():
        return max(least, int(json.loads(place.read_text())["gate"]))
    longest = max(LENGTHS) if shape is None else shape.length
    lengths = [length for length in LENGTHS if least < length <= longest]
    ratios = {length: ratio(topk, search, heads, length, shape) for length in lengths}
    faster = [length for length, share in ratios.items() if share < MARGIN]
    gate = min(faster) - 1 if faster else 1 << 40
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps({"gate": gate, "ratios": ratios}) + "\n")
    return max(least, gate)


def ratio(topk: TopK, search: Search, heads: Heads, length: int, shape: Shape | None = None) -> float:
    """Time of a prompt's attention with a search, as a share of dense attention's; random keys, processor time."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (
        torch.randn(1, count, length, heads.width, generator=generator) for count in (heads.query, heads.kv, heads.kv)
    )
    policy = finder(topk, search, 0, None if shape is None else Estimator(shape).requires_grad_(False))

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def sparse() -> Tensor:
        blocks = policy.prompt(q, k, v, length)
        assert blocks is not None  # all queries are known
        return block_attention(q, k, v, blocks)[0]

    taken = []
    with torch.inference_mode():
        for call in (dense, sparse):
            start = time.process_time()
            call()
            taken.append(time.process_time() - start)
    return taken[1] / taken[0]


def _key(topk: TopK, search: Search, heads: Heads, shape: Shape | None) -> str:
    library = native.library()
    told = [asdict(topk), asdict(search), asdict(heads), torch.__version__, torch.get_num_threads()]
    told += [] if shape is None else [asdict(shape)]
    told += [None if library is None else library.name, torch.cpu.get_capabilities()]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]
