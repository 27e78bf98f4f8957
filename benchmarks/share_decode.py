"""What sharing attention saves while tokens are written: a model against itself with some of its layers sharing.

Inner layers are cut into blocks of ``--block``: the first of each computes its probabilities, the others take them
(``--mode kv``: its keys and values). Weights are the model's own and the caches hold random states, since time depends
on neither. The sides take turns, token by token; a row gives the median ratio of their times, with its quartiles.

    python benchmarks/share_decode.py MODEL [--layers 9] [--block 4] [--batch 1] [--lengths 512,2048,4096] [--tokens 40]

MODEL is what ``compress.load`` reads: a dense model is run by transformers' own layers, a packed one in fused steps.
"""

import statistics
import time
from typing import Any, Literal

import click
import torch
from torch import Tensor
from transformers import PreTrainedModel

import compress
from compress.plan import AttentionPlan, Share, Source
from compress.plan_writer import PlanWriter
from compress.runtime.model import follow
from compress.runtime.plan_cache import PlanCache

Mode = Literal["attn", "kv"]
FIRST = 4  # layer of the first block


def shared_plan(config: Any, layers: int, block: int, mode: Mode) -> AttentionPlan:
    """So many layers that take from the first of their block."""
    writer = PlanWriter(AttentionPlan.empty(config), Source("blocks"))
    for number in range(layers):
        source = FIRST + number // (block - 1) * block
        writer.share(source + 1 + number % (block - 1), Share(mode, source))
    return writer.finish()


def filled(model: PreTrainedModel, plan: AttentionPlan, batch: int, length: int) -> PlanCache:
    """A cache of random states."""
    mark, cache = plan.fingerprint, PlanCache(model.config, plan)
    for index, layer in enumerate(plan.layers):
        mode = None if layer.share is None else layer.share.mode
        if mode != "kv":
            shape = (batch, mark.kv_heads, length, mark.head_dim)
            keys, values = torch.randn(shape), torch.randn(shape)
            cache.update(keys[..., :0] if mode == "attn" else keys, values, index)
    return cache


def seconds(model: PreTrainedModel, token: Tensor, cache: PlanCache) -> float:
    """Of one token of every sequence."""
    start = time.perf_counter()
    model(token, past_key_values=cache)
    return time.perf_counter() - start


@click.command()
@click.argument("model")
@click.option("--layers", default=9, show_default=True)
@click.option("--block", default=4, show_default=True)
@click.option("--mode", default="attn", show_default=True, type=click.Choice(["attn", "kv"]))
@click.option("--batch", default=1, show_default=True)
@click.option("--lengths", default="512,2048,4096", show_default=True)
@click.option("--tokens", default=40, show_default=True)
@click.option("--threads", default=1, show_default=True, help="Of packed layers.")
@torch.inference_mode()
def main(
    model: str,
    layers: int,
    block: int,
    mode: Literal["attn", "kv"],
    batch: int,
    lengths: str,
    tokens: int,
    threads: int,
) -> None:
    whole, sharing = (compress.load(model, threads=threads)[0] for _ in range(2))
    empty = AttentionPlan.empty(whole.config)
    plan = shared_plan(whole.config, layers, block, mode)
    follow(sharing, plan)
    sizes = [sum(x.nbytes for x in (*side.parameters(), *side.buffers())) / 1e6 for side in (whole, sharing)]
    click.echo(f"{layers} of {len(plan.layers)} layers share ({mode}); weights {sizes[0]:.1f} MB -> {sizes[1]:.1f} MB")
    click.echo("tokens batch  whole ms  sharing ms  faster (quartiles)  cache MB")
    for length in map(int, lengths.split(",")):
        caches = filled(whole, empty, batch, length), filled(sharing, plan, batch, length)
        token = torch.full((batch, 1), 100)
        for side, cache in zip((whole, sharing), caches, strict=True):
            for _ in range(3):
                seconds(side, token, cache)
        pairs = []
        for number in range(tokens):
            sides = [(whole, caches[0]), (sharing, caches[1])]
            found = [seconds(side, token, cache) for side, cache in (sides if number % 2 else sides[::-1])]
            pairs.append(found if number % 2 else found[::-1])
        ratios = sorted(one / two for one, two in pairs)
        middle = [1e3 * statistics.median(pair[side] for pair in pairs) for side in range(2)]
        low, mid, high = statistics.quantiles(ratios, n=4)
        held = [cache.nbytes().stored / 1e6 for cache in caches]
        faster = f"{mid - 1:+.1%} ({low - 1:+.1%} to {high - 1:+.1%})"
        row = f"{length:6} {batch:5}  {middle[0]:8.1f}  {middle[1]:10.1f}"
        click.echo(f"{row}  {faster}  {held[0]:.1f} -> {held[1]:.1f}")


if __name__ == "__main__":
    main()
