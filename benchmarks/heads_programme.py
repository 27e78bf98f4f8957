"""Seconds of MoA's programme by size, on invented costs of heads with very different needs.

python benchmarks/heads_programme.py [--layers 32] [--heads 8] [--rules 32]
"""

import time

import click
import numpy as np

from compress.heads.solve import Problem, solve

LENGTHS = 3
CONSTRAINTS = 4


def problem(layers: int, heads: int, rules: int, most: int | None, seed: int) -> Problem:
    """Costs fall with the density, for some heads soon and for others late; their sizes span several decades."""
    draw = np.random.default_rng(seed)
    densities = np.sort(draw.uniform(0.05, 1, (CONSTRAINTS, rules)), 1)
    densities[:, -1] = 1
    sizes = draw.lognormal(0, 2, (1, layers, heads, 1))
    speeds = draw.uniform(1, 20, (1, layers, heads, 1))
    costs = sizes * np.maximum(np.exp(-speeds * densities[:LENGTHS, None, None]) - np.exp(-speeds), 0)
    return Problem(costs * draw.uniform(0.8, 1.2, costs.shape), densities, limit=0.5, rules=most)


@click.command()
@click.option("--layers", default=32)
@click.option("--heads", default=8)
@click.option("--rules", default=32)
@click.option("--seeds", default=2)
def main(layers: int, heads: int, rules: int, seeds: int) -> None:
    click.echo(f"{layers} layers of {heads} KV heads, {rules} rules")
    for most in (None, 3, 2):
        for seed in range(seeds):
            of = problem(layers, heads, rules, most, seed)
            begun = time.perf_counter()
            found = solve(of, np.ones(LENGTHS))
            told = f"{time.perf_counter() - begun:6.1f} s, cost {sum(found.costs):.4g}"
            click.echo(f"at most {most or 'any number of'} rules a layer, seed {seed}: {told}")


if __name__ == "__main__":
    main()
