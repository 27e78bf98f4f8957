"""Seconds of MoA's programme by size, on invented costs of heads with very different needs.

Three profiled lengths, a budget at these and at a fourth. One core is used. What is found within the limit of time is
told with its gap, the relative distance from what may be possible.

    python benchmarks/heads_programme.py [--layers 32] [--heads 8] [--seeds 2]
"""

import time

import click
import numpy as np

from compress.heads.moa import kept, rule_set
from compress.heads.solve import Problem, solve
from compress.plan import Window
from compress.plan_writer import Rule

PROFILED = (2048, 4096, 8192)
CONSTRAINED = (2048, 4096, 8192, 16384)


def problem(layers: int, heads: int, most: int | None, seed: int) -> Problem:
    """MoA's rules at a sink of 64; costs fall with what is kept, soon or late, and span several decades over heads."""
    rules = [Rule(64, Window()), *rule_set(PROFILED, 64, CONSTRAINED)]
    densities = np.array([[kept(rule, length) / length for rule in rules] for length in CONSTRAINED])
    draw = np.random.default_rng(seed)
    sizes = draw.lognormal(0, 2, (1, layers, heads, 1))
    speeds = draw.uniform(1, 20, (1, layers, heads, 1))
    costs = sizes * (np.exp(-speeds * densities[: len(PROFILED), None, None]) - np.exp(-speeds))
    return Problem(costs * draw.uniform(0.8, 1.2, costs.shape), densities[:, None], limit=0.5, rules=most)


@click.command()
@click.option("--layers", default=32)
@click.option("--heads", default=8)
@click.option("--seeds", default=2)
def main(layers: int, heads: int, seeds: int) -> None:
    click.echo(f"{layers} layers of {heads} KV heads, {problem(1, 1, None, 0).costs.shape[-1]} rules")
    for most in (None, 3, 2):
        for seed in range(seeds):
            of = problem(layers, heads, most, seed)
            begun = time.perf_counter()
            found = solve(of, np.ones(len(PROFILED)))
            told = f"{time.perf_counter() - begun:6.1f} s, cost {sum(found.costs):.4g}, gap {found.gap:.1e}"
            click.echo(f"at most {most or 'any number of'} rules a layer, seed {seed}: {told}")


if __name__ == "__main__":
    main()
