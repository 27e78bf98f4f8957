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

LENGTHS = (2048, 4096, 8192, 16384)
GPU_GATE = 8192  # tokens; not measured: where dense attention is fast, published figures break even here
MARGIN = 0.98  # sparse attention has to take less than this share of dense attention's time


@dataclass(frozen=True)
class Heads:
    """Query heads, KV heads and head size of a layer."""

    query: int
    kv: int
    width: int


def gate_of(topk: TopK, search: Search, heads: Heads, folder: Path | None = None) -> int:
    """Tokens up to which attention is dense.

    Args:
        topk: policy and tokens.
        search: how; its own gate, if it has one, is taken.
        heads: of the model.
        folder: where what was measured is kept; the user's cache folder by default.

    Returns:
        At least what sink, window and list hold together. Where no length of `LENGTHS` is faster, a length that no text
        has.
    """
    least = search.sink + search.window + topk.k
    if search.gate is not None:
        return max(least, search.gate)
    if torch.cuda.is_available():
        return max(least, GPU_GATE)
    place = (user_cache_path("compress") if folder is None else folder) / "gates" / f"{_key(topk, search, heads)}.json"
    if place.exists():
        return max(least, int(json.loads(place.read_text())["gate"]))
    ratios = {length: ratio(topk, search, heads, length) for length in LENGTHS if length > least}
    faster = [length for length, share in ratios.items() if share < MARGIN]
    gate = min(faster) - 1 if faster else 1 << 40
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps({"gate": gate, "ratios": ratios}) + "\n")
    return max(least, gate)


def ratio(topk: TopK, search: Search, heads: Heads, length: int) -> float:
    """Time of a prompt's attention with a search, as a share of dense attention's; random keys, processor time."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (
        torch.randn(1, count, length, heads.width, generator=generator) for count in (heads.query, heads.kv, heads.kv)
    )
    policy = finder(topk, search, 0)

    def dense() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def sparse() -> Tensor:
        return block_attention(q, k, v, policy.prompt(q, k))[0]

    taken = []
    with torch.inference_mode():
        for call in (dense, sparse):
            start = time.process_time()
            call()
            taken.append(time.process_time() - start)
    return taken[1] / taken[0]


def _key(topk: TopK, search: Search, heads: Heads) -> str:
    library = native.library()
    told = [asdict(topk), asdict(search), asdict(heads), torch.__version__, torch.get_num_threads()]
    told += [None if library is None else library.name, torch.cpu.get_capabilities()]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]
