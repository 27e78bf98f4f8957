"""Attention over a packed KV cache against fp32 SDPA, layer by layer as a model goes through them, on one thread.

Every layer has a cache of its own, so that none stays in the processor's caches. The sides take turns, and a row gives
the median ratio with its quartiles. "step" is all that one new token costs in a layer: rotating, keeping, attending;
"prompt" is the whole prompt's attention, with scoring and packing.

    python benchmarks/kv_decode.py [--lengths 1024,2048,4096,8192] [--layers 15] [--rounds 9]
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import click
import torch
import torch.nn.functional as F
from compress.kernels.segment_attention import path
from torch import Tensor

from compress.kv.layer import Cluster, PlanLayer
from compress.kv.packed import PackedFormat, PackedPart
from compress.kv.rotation import Rotation
from compress.plan import KVBits, Packing

HEADS, KV_HEADS, WIDTH = 9, 3, 64  # SmolLM2-135M
SCALE = WIDTH**-0.5

States = tuple[Tensor, Tensor, Tensor]


def states(tokens: int, generator: torch.Generator) -> States:
    """Random queries, keys and values of one sequence."""
    q, k, v = (torch.randn(1, n, tokens, WIDTH, generator=generator) for n in (HEADS, KV_HEADS, KV_HEADS))
    return q, k, v


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def dense(prompt: States) -> Tensor:
    q, k, v = prompt
    return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=True, scale=SCALE)


def packed(layer: PlanLayer, new: States) -> Tensor:
    layer.update(new[1], new[2])
    return layer.attend(new[0], None, SCALE)


def spread(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def row(length: int, layers: int, rounds: int) -> str:
    """One length's figures."""
    generator, turn = torch.Generator().manual_seed(0), Rotation(WIDTH)
    parts = [PackedPart(PackedFormat(Packing(), KVBits(), i, turn)) for i in range(layers)]
    held = [PlanLayer(i, [Cluster(None, part)]) for i, part in enumerate(parts)]
    prompts = [states(length, generator) for _ in held]
    more, whole = [], []
    for layer, prompt in zip(held, prompts, strict=True):
        whole.append(seconds(partial(dense, prompt)))
        more.append(seconds(partial(packed, layer, prompt)) - whole[-1])
    reading, step, times = [], [], []

    def attended(new: States) -> None:
        for _, key, value in prompts:
            dense((new[0], key, value))

    def read(new: States) -> None:
        for part in parts:
            part.read(new[0], SCALE)

    def stepped(new: States) -> None:
        for layer in held:
            packed(layer, new)

    for _ in range(rounds):
        new = states(1, generator)
        times.append(seconds(partial(attended, new)))
        reading.append(times[-1] / seconds(partial(read, new)))
        step.append(times[-1] / seconds(partial(stepped, new)))
    return (
        f"{length:6}  {1e3 * statistics.median(times) / layers:7.3f}  {spread(reading):20}  {spread(step):20}  "
        f"{1e3 * statistics.median(more):14.1f}  {statistics.median(more) / statistics.median(whole):.0%}"
    )


@click.command()
@click.option("--lengths", default="1024,2048,4096,8192", show_default=True)
@click.option("--layers", default=15, show_default=True)
@click.option("--rounds", default=9, show_default=True)
@torch.no_grad()
def main(lengths: str, layers: int, rounds: int) -> None:
    torch.set_num_threads(1)
    click.echo(f"path {path(torch.zeros(1, 1, 1, WIDTH))}; ratios are SDPA's time over the packed layer's")
    click.echo("tokens  SDPA ms  reading               step                  prompt ms more  of the prompt's SDPA")
    for length in map(int, lengths.split(",")):
        click.echo(row(length, layers, rounds))


if __name__ == "__main__":
    main()
