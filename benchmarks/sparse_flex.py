"""The same mask in PyTorch's FlexAttention: HiP's lists as a block mask, against ours and dense SDPA, on one thread.

FlexAttention computes whole tiles of the mask, so a tile is visited where any of its pairs is seen, and a mask function
takes away the rest; the share of visited tiles is told. It is compiled (a C++ compiler is needed), and neither that nor
making the mask from the lists is counted. All sides see the same keys; the largest difference from ours is told. They
take turns; a row gives the median of SDPA's processor seconds over theirs, with quartiles.

    python benchmarks/sparse_flex.py [--lengths 2048,4096,8192] [--k 512] [--window 128] [--sink 16] [--rounds 5]
"""

import statistics
import time
from collections.abc import Callable

import click
import torch
import torch.nn.functional as F
from compress.kernels.block_attention import BlockList, block_attention
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from compress.plan import Search, TopK
from compress.sparse.finder import finder


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def listed(blocks: BlockList, length: int) -> Tensor:
    """Which slots each block of rows has in its list, [KV heads, blocks, slots] bool."""
    heads, count, most = blocks.starts.shape[1:]
    slots = blocks.starts[0, ..., None] + torch.arange(blocks.block_k)
    there = (torch.arange(most) < blocks.counts[0, ..., None])[..., None].expand_as(slots)
    found = torch.zeros(heads, count, length + 1, dtype=torch.bool)
    places = torch.where(there, slots.clamp(max=length), length).long()
    return found.scatter_(2, places.flatten(2), True)[..., :length].contiguous()


def block_mask(blocks: BlockList, length: int, group: int) -> BlockMask:
    """Sink, window and list as a mask function, and its tiles."""
    named = listed(blocks, length)

    def seen(b: Tensor, h: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        block = row // blocks.block_q
        near = slot > block * blocks.block_q - blocks.window
        return (slot <= row) & ((slot < blocks.sink) | near | named[h // group, block, slot])

    heads = named.shape[0] * group
    return create_block_mask(seen, 1, heads, length, length, device="cpu", BLOCK_SIZE=(blocks.block_q, 64))


def spread(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:5.2f} ({low:.2f}-{high:.2f})"


@click.command()
@click.option("--lengths", default="2048,4096,8192", show_default=True)
@click.option("--k", "tokens", default=512, show_default=True)
@click.option("--window", default=128, show_default=True)
@click.option("--sink", default=16, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--heads", default="9,3,64", show_default=True, help="Query heads, KV heads, head size.")
@torch.inference_mode()
def main(lengths: str, tokens: int, window: int, sink: int, rounds: int, heads: str) -> None:
    torch.set_num_threads(1)
    query, kv, width = map(int, heads.split(","))
    policy = finder(TopK(tokens, "hip"), Search(sink=sink, window=window), 0)
    compiled = torch.compile(flex_attention, dynamic=False)
    click.echo("tokens  tiles visited  ours, found lists: x SDPA  FlexAttention: x SDPA  largest difference")
    for length in map(int, lengths.split(",")):
        generator = torch.Generator().manual_seed(length)
        q, k, v = (torch.randn(1, n, length, width, generator=generator) for n in (query, kv, kv))
        blocks = policy.prompt(q, k, v, q.shape[2])
        mask = block_mask(blocks, length, query // kv)
        other = compiled(q, k, v, block_mask=mask, enable_gqa=True)
        difference = (other - block_attention(q, k, v, blocks)[0]).abs().max()
        ours, flex = [], []
        for _ in range(rounds):
            dense = seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))  # noqa: B023
            ours.append(dense / seconds(lambda: block_attention(q, k, v, blocks)))  # noqa: B023
            flex.append(dense / seconds(lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)))  # noqa: B023
        visited = 1 - mask.sparsity() / 100
        click.echo(f"{length:6}  {visited:13.1%}  {spread(ours):24}  {spread(flex):21}  {difference:.1e}")


if __name__ == "__main__":
    main()
