"""Packed linear layers in C++ against ``F.linear`` in fp32, on one thread.

Prints how many times as fast a layer is: CPU time of this thread, best of several rounds, every round going over enough
copies of the weights that the dense ones don't stay in the third cache. Shapes are SmolLM2-135M's and larger ones.

    python benchmarks/quant_linear.py [--build avx2] [--tokens 1,4,16,128] [--bits 2,3,4,8]

The page ``docs/kernels.md`` says which machine its figures come from.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import click
import torch
import torch.nn.functional as F
from compress.kernels import native
from compress.kernels.quant_linear import QuantWeight, cpu, from_codes
from torch import Tensor

SHAPES = ((576, 576), (576, 192), (576, 1536), (1536, 576), (2048, 2048), (2048, 8192))  # K, N
GROUP = 64
COLD_BYTES = 200 << 20
ROUNDS = 7
CALLS = 0.02  # seconds of calls in a round, as far as one call isn't longer


@dataclass(frozen=True)
class Layers:
    """Copies of one layer: dense, and packed at each width."""

    dense: list[Tensor]
    packed: dict[int, list[QuantWeight]]


def seconds(call: Callable[[int], object]) -> float:
    """CPU time of one call, which gets its number."""
    start = time.thread_time()
    call(0)
    calls = max(3, int(CALLS / max(1e-9, time.thread_time() - start)))
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.thread_time()
        for number in range(calls):
            call(number)
        best = min(best, (time.thread_time() - start) / calls)
    return best


def layers(columns: int, rows: int, widths: list[int]) -> Layers:
    copies = max(2, COLD_BYTES // (4 * columns * rows))
    packed = {bits: [random_layer(columns, rows, bits)] for bits in widths}
    for found in packed.values():
        first = found[0]
        for _ in range(copies - 1):
            zero = None if first.zero is None else first.zero.clone()
            same = (zero, first.shape, first.bits, first.group_size, first.layout)
            found.append(QuantWeight(first.codes.clone(), first.scale.clone(), *same))
    return Layers([torch.randn(rows, columns) for _ in range(copies)], packed)


def random_layer(columns: int, rows: int, bits: int) -> QuantWeight:
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    scale = torch.rand(rows, columns // GROUP).half()
    return from_codes(codes, scale, None, bits, GROUP, "rows")


def row(made: Layers, tokens: int, build: native.Library) -> tuple[float, list[float]]:
    """Seconds of the dense layer, and how many times as fast each width is with float and int8 activations."""
    x = torch.randn(tokens, made.dense[0].shape[1])
    base = seconds(lambda i: F.linear(x, made.dense[i % len(made.dense)]))
    ratios = []
    for copies in made.packed.values():
        for kind in ("float", "int8"):
            ratios.append(base / seconds(lambda i: cpu.quant_linear(x, copies[i % len(copies)], None, kind, 1, build)))  # noqa: B023
    return base, ratios


@click.command()
@click.option("--build", default=None, type=click.Choice(native.BUILDS), help="One build; by default the best.")
@click.option("--tokens", default="1,4,16,128", help="Numbers of tokens, with commas between them.")
@click.option("--bits", default="2,3,4,8", help="Widths, with commas between them.")
def main(build: str | None, tokens: str, bits: str) -> None:
    torch.set_num_threads(1)
    library = native.library() if build is None else next((b for b in native.runnable() if b.name == build), None)
    if library is None:
        raise click.ClickException("that build isn't compiled here, or this processor can't run it")
    widths = [int(width) for width in bits.split(",")]
    click.echo(f"build {library.name}, group size {GROUP}, times as fast as fp32 F.linear: float / int8 activations\n")
    click.echo("| K x N | tokens | fp32 ms | " + " | ".join(f"W{width}" for width in widths) + " |")
    click.echo("|---|---|---|" + "---|" * len(widths))
    for columns, rows in SHAPES:
        made = layers(columns, rows, widths)
        for count in map(int, tokens.split(",")):
            base, ratios = row(made, count, library)
            cells = [f"{ratios[2 * i]:.1f} / {ratios[2 * i + 1]:.1f}" for i in range(len(widths))]
            click.echo(f"| {columns} x {rows} | {count} | {1e3 * base:.3f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
