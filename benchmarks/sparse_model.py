"""What dynamic sparse attention could save on an H100: operations and bytes of one layer, counted, not measured.

A side takes at least the longer of its operations at the processor's rate for half precision and its bytes at the
memory's (the roofline); launches, softmax and gathering in pieces smaller than a memory transaction come on top, so
the ratios are bounds. Prompt: ``4 D T^2 / 2`` operations a query head for dense causal attention, ``4 D`` a row and
seen key for a list; a search's stage reads two keys a level of each chunk's descent, for the pooled queries of a block
of rows. Decoding: keys and values are read once by dense attention; a list's are, and a stage's representatives every
`refresh` steps.

    python benchmarks/sparse_model.py [--lengths 8192,32768,131072,1048576] [--heads 32,8,128] [--k 1024]
"""

import math

import click

from compress.plan import Search, TopK
from compress.sparse.finder import hip_settings
from compress.sparse.hip import HipSettings

FLOPS, BYTES = 989e12, 3.35e12  # a second, H100 SXM: bfloat16 without sparsity, HBM3
HALF = 2  # bytes of a number


def floor(operations: float, nbytes: float) -> float:
    """Seconds."""
    return max(operations / FLOPS, nbytes / BYTES)


def searched(settings: HipSettings, length: int) -> list[tuple[float, int, int]]:
    """Of every stage: keys that are read for a block of rows, rows that are averaged, steps between two searches."""
    found = []
    for stage in settings.stages:
        chunks = stage.kept(length) / stage.chunk
        found.append((chunks * 2 * math.log2(stage.chunk), stage.pool, stage.refresh))
    return found


def prompt(settings: HipSettings, length: int, heads: int, kv_heads: int, width: int) -> tuple[float, float, float]:
    """Seconds of dense attention, of attention over lists, and of the search."""
    io = HALF * length * width * 2 * (heads + kv_heads)
    dense = floor(4 * width * heads * length**2 / 2, io)
    seen = min(length / 2, settings.sink + settings.k + settings.window + settings.block_q / 2)
    blocks = length / settings.block_q
    gathered = HALF * 2 * width * seen * blocks * kv_heads
    listed = floor(4 * width * heads * length * seen, io + gathered)
    operations = nbytes = 0.0
    for keys, pool, _ in searched(settings, length):
        operations += 2 * width * keys * blocks * heads * settings.block_q / pool
        nbytes += HALF * width * keys * blocks * kv_heads
    return dense, listed, floor(operations, nbytes)


def token(settings: HipSettings, length: int, heads: int, kv_heads: int, width: int) -> tuple[float, float, float]:
    """The same for one new token, the search spread over the steps between two."""
    dense = floor(4 * width * heads * length, HALF * 2 * width * kv_heads * length)
    seen = min(length, settings.sink + settings.k + settings.window)
    listed = floor(4 * width * heads * seen, HALF * 2 * width * kv_heads * seen)
    search = sum(
        floor(2 * width * keys * heads, HALF * width * keys * kv_heads) / steps
        for keys, _, steps in searched(settings, length)
    )
    return dense, listed, search


@click.command()
@click.option("--lengths", default="8192,32768,131072,1048576", show_default=True)
@click.option("--heads", default="32,8,128", show_default=True, help="Query heads, KV heads, head size.")
@click.option("--k", "tokens", default=1024, show_default=True)
@click.option("--window", default=1024, show_default=True)
@click.option("--sink", default=128, show_default=True)
def main(lengths: str, heads: str, tokens: int, window: int, sink: int) -> None:
    query, kv, width = map(int, heads.split(","))
    settings = hip_settings(TopK(tokens, "hip"), Search(sink=sink, window=window))
    click.echo(f"{query} query heads over {kv} KV heads of {width}, one layer, half precision; k={tokens}")
    click.echo("tokens      prompt ms: dense, lists, search   at most   token us: dense, lists, search   at most")
    for length in map(int, lengths.split(",")):
        cells = []
        for side, unit in ((prompt, 1e3), (token, 1e6)):
            dense, listed, search = side(settings, length, query, kv, width)
            told = f"{dense * unit:9.3f} {listed * unit:9.3f} {search * unit:9.3f}"
            cells.append(f"{told}   {dense / (listed + search):5.1f}x")
        click.echo(f"{length:9,}   {cells[0]}   {cells[1]}")


if __name__ == "__main__":
    main()
