"""What a search among packed keys saves while tokens are written: a packed cache against itself, one thread.

Random keys and values of one layer fill two caches of a recipe's section `kv`; one attends all that is packed, the
other what a search finds, at its intervals. The sides and fp32 SDPA over the unpacked tokens take turns, token by
token; a row gives mean processor milliseconds a token, ratios of sums over 32 tokens (median, least, largest), and the
allocated bytes of both caches.

    python benchmarks/sparse_packed.py [--lengths 4096,8192,16384,32768] [--methods hip,quest,block_mean]
        [--kv zipcache-plus] [--k 512] [--window 256] [--sink 16] [--steps 64] [--heads 9,3,64]
"""

import statistics
import time
from collections.abc import Callable

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.kv.packed import PackedFormat, PackedPart
from compress.kv.part import Call
from compress.kv.rotation import Rotation
from compress.kv.schemes import bits_of, packing_of
from compress.kv.searched_packed import SearchedPackedPart
from compress.kv.window import Tokens
from compress.plan import Search, TopK
from compress.recipe import Recipe
from compress.sparse.finder import finder


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def filled(part: PackedPart, k: Tensor, v: Tensor) -> PackedPart:
    part.begin(k)
    part.keep(Tokens(k.clone(), v), Call(k.shape[3] ** -0.5, torch.zeros(1, dtype=torch.int64), True))
    return part


@click.command()
@click.option("--lengths", default="4096,8192,16384,32768", show_default=True)
@click.option("--methods", default="hip,quest,block_mean", show_default=True)
@click.option("--kv", default="zipcache-plus", show_default=True)
@click.option("--k", "listed", default=512, show_default=True)
@click.option("--window", default=256, show_default=True)
@click.option("--sink", default=16, show_default=True)
@click.option("--steps", default=64, show_default=True)
@click.option("--heads", default="9,3,64", show_default=True, help="Query heads, KV heads, head size.")
@torch.inference_mode()
def main(lengths: str, methods: str, kv: str, listed: int, window: int, sink: int, steps: int, heads: str) -> None:
    torch.set_num_threads(1)
    query, kv_heads, width = map(int, heads.split(","))
    settings = Recipe.load(kv).kv
    assert settings is not None
    packing, search = packing_of(settings, 0), Search(sink=sink, window=window)
    rotation = Rotation(width) if packing.rotate else None
    kept = PackedFormat(packing, bits_of(settings, [0, 1, 2])[1], 1, rotation)
    click.echo(
        f"{query} query heads over {kv_heads} KV heads of {width}; {kv}; k={listed}, window {window}, sink {sink}"
    )
    click.echo("method      tokens  packed ms  searched ms  packed / searched   SDPA / searched     allocated MB")
    for length in map(int, lengths.split(",")):
        generator = torch.Generator().manual_seed(length)
        k, v = (torch.randn(1, kv_heads, length, width, generator=generator) for _ in "kv")
        whole = filled(PackedPart(kept), k, v)
        for method in methods.split(","):
            part = filled(SearchedPackedPart(kept, finder(TopK(listed, method), search, 0), sink), k, v)
            times: list[tuple[float, float, float]] = []
            for _ in range(steps):
                q = torch.randn(1, query, 1, width, generator=generator)
                new = [torch.randn(1, kv_heads, 1, width, generator=generator) for _ in "kv"]
                sides = (
                    lambda q=q: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),  # noqa: B023
                    lambda q=q, new=new: whole.step(q, Tokens(new[0].clone(), new[1]), width**-0.5),  # noqa: B023
                    lambda q=q, new=new: part.step(q, Tokens(new[0].clone(), new[1]), width**-0.5),  # noqa: B023
                )
                dense, packed, searched = (seconds(side) for side in sides)
                times.append((dense, packed, searched))
            blocks = [times[n : n + 32] for n in range(0, steps, 32)]  # whole intervals of every stage
            sums = [tuple(map(sum, zip(*block, strict=True))) for block in blocks]
            dense, packed, searched = (1000 * sum(column) / steps for column in zip(*times, strict=True))
            ratios = [[own[side] / own[2] for own in sums] for side in (1, 0)]
            told = "  ".join(f"{statistics.median(own):5.2f} ({min(own):.2f}-{max(own):.2f})" for own in ratios)
            sizes = " and ".join(f"{cache.nbytes().allocated / 1e6:.2f}" for cache in (whole, part))
            click.echo(f"{method:10}  {length:6}  {packed:9.3f}  {searched:11.3f}  {told}  {sizes}")


if __name__ == "__main__":
    main()
