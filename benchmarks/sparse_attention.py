"""What dynamic sparse attention saves: attention over what a search finds, against fp32 SDPA over all, one thread.

Random queries, keys and values of one layer. "prompt" is the search and the attention of a whole prompt, "decoding" a
new token's step through the cache, searches at their intervals among 32 of them, with one cache a layer so that none
stays in the processor's caches. SEA's estimator isn't fitted, which its time doesn't depend on. The sides take turns; a
row gives the median ratio of processor seconds, SDPA's over ours, with its quartiles, and how seconds grow with the
length, as the exponent of the fitted power law.

    python benchmarks/sparse_attention.py [--lengths 2048,4096,8192,16384,32768] [--methods hip,quest,block_mean]
        [--k 512] [--window 128] [--sink 16] [--rounds 5] [--heads 9,3,64]
"""

import math
import statistics
import time
from collections.abc import Callable

import click
import torch
import torch.nn.functional as F
from compress.kernels.block_attention import block_attention
from torch import Tensor

from compress.kv.part import Call
from compress.kv.searched import SearchedPart
from compress.kv.window import Tokens
from compress.plan import Search, TopK
from compress.sparse.finder import Finder, finder
from compress.sparse.sea import Estimator, Shape

STEPS = 32


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def spread(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return f"{middle:5.2f} ({low:.2f}-{high:.2f})"


def exponent(lengths: list[int], taken: list[float]) -> float:
    """Of the power law through the points, by least squares on logarithms."""
    x, y = [math.log(n) for n in lengths], [math.log(s) for s in taken]
    return statistics.linear_regression(x, y).slope if len(x) > 1 else math.nan


def prompt(policy: Finder, q: Tensor, k: Tensor, v: Tensor, rounds: int) -> tuple[float, float, list[float]]:
    """Median seconds of the search and of both, and SDPA's seconds over ours."""
    searched, both, ratios = [], [], []
    for _ in range(rounds):
        dense = seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
        searched.append(seconds(lambda: policy.prompt(q, k, v, q.shape[2])))
        both.append(seconds(lambda: block_attention(q, k, v, policy.prompt(q, k, v, q.shape[2]))))
        ratios.append(dense / both[-1])
    return statistics.median(searched), statistics.median(both), ratios


def decoding(policy: Finder, k: Tensor, v: Tensor, heads: int, rounds: int) -> list[float]:
    """SDPA's seconds over ours, for steps at a length."""
    call = Call(k.shape[3] ** -0.5, torch.zeros(1, dtype=torch.int64), True)
    part = SearchedPart(policy)
    part.begin(k)
    part.keep(Tokens(k, v), call)
    generator, ratios = torch.Generator().manual_seed(1), []
    shape = (1, 1, k.shape[3])
    for n in range(rounds + (policy.earlier > 0)):  # sea attends everything until it knows some queries
        taken = [0.0, 0.0]
        for _ in range(STEPS):
            query = torch.randn(1, heads, *shape[1:], generator=generator)
            new = Tokens(*(torch.randn(1, k.shape[1], *shape[1:], generator=generator) for _ in "kv"))
            taken[0] += seconds(lambda: F.scaled_dot_product_attention(query, k, v, enable_gqa=True))  # noqa: B023
            taken[1] += seconds(lambda: part.step(query, new, call.scaling))  # noqa: B023
        if n >= (policy.earlier > 0):
            ratios.append(taken[0] / taken[1])
    return ratios


@click.command()
@click.option("--lengths", default="2048,4096,8192,16384,32768", show_default=True)
@click.option("--methods", default="hip,quest,block_mean", show_default=True)
@click.option("--k", "listed", default=512, show_default=True)
@click.option("--window", default=128, show_default=True)
@click.option("--sink", default=16, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--heads", default="9,3,64", show_default=True, help="Query heads, KV heads, head size.")
@torch.inference_mode()
def main(lengths: str, methods: str, listed: int, window: int, sink: int, rounds: int, heads: str) -> None:
    torch.set_num_threads(1)
    query, kv, width = map(int, heads.split(","))
    search = Search(sink=sink, window=window)
    click.echo(f"{query} query heads over {kv} KV heads of {width}; k={listed}, window {window}, sink {sink}")
    click.echo("method       tokens  search s  with attention s  prompt: x SDPA      decoding: x SDPA")
    for method in methods.split(","):
        shape = Shape(query, kv, width, max(map(int, lengths.split(","))), width=128)
        estimator = Estimator(shape).requires_grad_(False) if method == "sea" else None
        policy = finder(TopK(listed, method), search, 0, estimator)
        done, taken = [], []
        for length in map(int, lengths.split(",")):
            generator = torch.Generator().manual_seed(length)
            q, k, v = (torch.randn(1, n, length, width, generator=generator) for n in (query, kv, kv))
            searched, both, ratios = prompt(policy, q, k, v, rounds if length < 16384 else 1)
            steps = decoding(policy, k, v, query, rounds)
            done.append(length)
            taken.append(both)
            click.echo(f"{method:11}  {length:6}  {searched:8.3f}  {both:16.3f}  {spread(ratios):18}  {spread(steps)}")
        click.echo(f"{method:11}  a prompt's seconds grow as length^{exponent(done, taken):.2f}")


if __name__ == "__main__":
    main()
