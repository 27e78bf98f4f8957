"""Attention where half the KV heads see a window, against fp32 SDPA of all heads, on one thread.

Layers have 9 query and 3 KV heads of 64 channels; one and two of the three stream, in turns. Every layer has a cache of
its own, so that none stays in the processor's caches. The sides take turns, and a row gives the median ratio with its
quartiles: SDPA's time over ours, of prompts over two layers (half of their heads stream), of a new token over all
layers. Up to sink and window nothing is dropped: the ratio's distance from 1 is what the plan costs there.

    python benchmarks/heads_attention.py [--lengths 256,2048,8192] [--layers 10] [--rounds 9]
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import click
import torch
import torch.nn.functional as F
from compress.kernels.ragged_decode import path
from torch import Tensor

from compress.kv.growing import GrowingLayer
from compress.kv.layer import Cluster, Handle, PlanLayer
from compress.kv.plain import PlainPart, Reach
from compress.plan import Window

HEADS, KV_HEADS, WIDTH = 9, 3, 64  # SmolLM2-135M
SCALE = WIDTH**-0.5
FULL = Reach(0, Window())

States = tuple[Tensor, Tensor, Tensor]


def states(tokens: int, generator: torch.Generator) -> States:
    """Random queries, keys and values of one sequence, as a model sends them: heads behind tokens."""
    q, k, v = (
        torch.randn(1, tokens, n, WIDTH, generator=generator).transpose(1, 2) for n in (HEADS, KV_HEADS, KV_HEADS)
    )
    return q, k, v


def seconds(call: Callable[[], object]) -> float:
    """Of the processor, which is what one thread takes, whatever else the machine does."""
    start = time.process_time()
    call()
    return time.process_time() - start


def dense(layer: GrowingLayer, new: States) -> Tensor:
    keys, values = layer.update(new[1], new[2])
    return F.scaled_dot_product_attention(
        new[0], keys, values, is_causal=new[0].shape[2] > 1, enable_gqa=True, scale=SCALE
    )


def planned(layer: PlanLayer, new: States) -> Tensor:
    keys, values = layer.update(new[1], new[2])
    if isinstance(keys, Handle):
        return layer.attend(new[0], None, SCALE)
    return F.scaled_dot_product_attention(
        new[0], keys, values, is_causal=new[0].shape[2] > 1, enable_gqa=True, scale=SCALE
    )


def layer_of(index: int, reach: Reach) -> PlanLayer:
    """One or two streaming heads, behind the others, as they are loaded."""
    streaming = 1 + index % 2
    heads = tuple(range(KV_HEADS))
    return PlanLayer(
        index,
        [Cluster(heads[:-streaming], PlainPart(FULL)), Cluster(heads[-streaming:], PlainPart(reach))],
    )


def spread(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def ratio(pairs: list[tuple[float, float]]) -> float:
    """Of the sums."""
    one, other = zip(*pairs, strict=True)
    return sum(one) / sum(other)


def row(length: int, layers: int, rounds: int, reach: Reach) -> str:
    """One length's figures."""
    generator = torch.Generator().manual_seed(0)
    prompts = [states(length, generator) for _ in range(layers)]
    full, held = [GrowingLayer() for _ in prompts], [layer_of(i, reach) for i in range(layers)]
    times = [
        (seconds(partial(dense, a, new)), seconds(partial(planned, b, new)))
        for a, b, new in zip(full, held, prompts, strict=True)
    ]
    prompt = [ratio(times[layer : layer + 2]) for layer in range(0, layers - 1, 2)]

    def step(call: Callable[..., Tensor], own: list[GrowingLayer] | list[PlanLayer], new: States) -> None:
        for layer in own:
            call(layer, new)

    decode = []
    for _ in range(rounds):
        new = states(1, generator)
        decode.append(seconds(partial(step, dense, full, new)) / seconds(partial(step, planned, held, new)))
    stored = sum(layer.nbytes().stored for layer in held) / sum(2 * layer.keys.nbytes for layer in full)
    return f"{length:6}  {spread(prompt):20}  {spread(decode):20}  {stored:.3f}"


@click.command()
@click.option("--lengths", default="256,2048,8192", show_default=True)
@click.option("--layers", default=10, show_default=True)
@click.option("--rounds", default=9, show_default=True)
@click.option("--sink", default=64, show_default=True)
@click.option("--recent", default=256, show_default=True)
@torch.no_grad()
def main(lengths: str, layers: int, rounds: int, sink: int, recent: int) -> None:
    torch.set_num_threads(1)
    reach = Reach(sink, Window(a=recent, b=0.0))
    click.echo(f"path {path(torch.zeros(1, 1, 1, WIDTH))}; sink {sink}, recent {recent}")
    click.echo("tokens  prompt                decode                stored of dense")
    for length in map(int, lengths.split(",")):
        click.echo(row(length, layers, rounds, reach))


if __name__ == "__main__":
    main()
