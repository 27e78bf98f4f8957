"""`attention_mass` against the code that RSQ's calibration had before it, and against PyTorch's whole softmax.

The sides take turns, so that a busy machine slows all of them; a row gives the median ratio of neighbours and its
quartiles, in CPU time of one thread. The earlier code is read from git, so run it inside a clone.

    python benchmarks/attention_mass.py [--rounds 15] [--commit 5b7ae7c]
"""

import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import click
import torch
from compress.kernels.attention_mass import attention_mass
from compress.kernels.attention_mass.reference import attention_mass as whole_softmax
from torch import Tensor

# heads, KV heads, tokens, head size, window
SHAPES = (
    (9, 3, 512, 64, None),
    (9, 3, 1024, 64, None),
    (9, 3, 2048, 64, None),
    (8, 2, 2048, 128, 512),
    (4, 4, 2048, 64, 128),
)


def earlier(commit: str) -> Callable[..., Tensor]:
    """`attention_concentration` of a commit that still had its own loop."""
    root = Path(__file__).parents[1]
    source = subprocess.run(
        ["git", "show", f"{commit}:calibrate/importance.py"], capture_output=True, text=True, check=True, cwd=root
    ).stdout
    module = types.ModuleType("earlier_importance")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(source, module.__name__, "exec"), module.__dict__)
    return module.attention_concentration


def seconds(side: Callable[[], Tensor]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    side()
    return time.process_time() - start


def paired(side: Callable[[], Tensor], other: Callable[[], Tensor], rounds: int) -> str:
    """Median and quartiles of other / side; who is first alternates, as a call pays for what another left."""
    ratios = []
    for i in range(2 * rounds):
        times = {call: seconds(call) for call in ((side, other) if i % 2 else (other, side))}
        ratios.append(times[other] / times[side])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:5.2f} ({low:.2f} to {high:.2f})"


@click.command()
@click.option("--rounds", default=15, show_default=True)
@click.option("--commit", default="5b7ae7c", show_default=True, help="Where the earlier code is.")
def main(rounds: int, commit: str) -> None:
    torch.set_num_threads(1)
    before = earlier(commit)
    click.echo("heads  tokens  D    window  now ms   earlier / now          whole softmax / now    same bits")
    for heads, kv_heads, length, width, window in SHAPES:
        generator = torch.Generator().manual_seed(0)
        q, k = (torch.randn(n, length, width, generator=generator) for n in (heads, kv_heads))
        arguments = (q[None], k[None], None, width**-0.5, window, True)
        sides: list[Callable[[], Tensor]] = [
            lambda a=arguments: attention_mass(*a),
            lambda q=q, k=k, w=window, d=width: before(q, k, scaling=d**-0.5, window=w),
            lambda a=arguments: whole_softmax(*a),
        ]
        same = torch.equal(sides[0]()[0], sides[1]())
        texts = [paired(sides[0], other, rounds) for other in sides[1:]]
        now = 1000 * statistics.median(seconds(sides[0]) for _ in range(rounds))
        place = f"{heads}/{kv_heads:<5}{length:5}  {width:3}  {window or '-':>6}"
        click.echo(f"{place}  {now:6.1f}   {texts[0]:21}  {texts[1]:21}  {'yes' if same else 'no'}")


if __name__ == "__main__":
    main()
