"""What a packed cache costs while a prompt is read: the whole model's prefill with it, against its plain cache.

The sides take turns on one thread; a row gives the median ratio of their times less one.

    python benchmarks/kv_prefill.py --model MODEL [--lengths 2048,4096,8192] [--rounds 3] [--kv zipcache-plus]
"""

import statistics
import time

import click
import torch
from transformers import Cache

import compress
from compress.kv.attention import NAME
from compress.kv.schemes import from_recipe
from compress.plan import AttentionPlan
from compress.runtime.plan_cache import PlanCache


@click.command()
@click.option("--model", required=True)
@click.option("--lengths", default="2048,4096,8192", show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--kv", default="zipcache-plus", show_default=True, help="A recipe with a section kv.")
@torch.no_grad()
def main(model: str, lengths: str, rounds: int, kv: str) -> None:
    torch.set_num_threads(1)
    loaded, _ = compress.load(model)
    loaded.set_attn_implementation(NAME)
    packed = from_recipe(kv, loaded.config).make
    assert packed is not None

    def seconds(ids: torch.Tensor, cache: Cache) -> float:
        start = time.perf_counter()
        loaded(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        return time.perf_counter() - start

    click.echo("tokens  dense s  more with the packed cache")
    for length in map(int, lengths.split(",")):
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(loaded.config.vocab_size, (1, length), generator=generator)
        pairs = [
            (seconds(ids, PlanCache(loaded.config, AttentionPlan.empty(loaded.config))), seconds(ids, packed(0)))
            for _ in range(rounds)
        ]
        more = [with_it / without - 1 for without, with_it in pairs]
        told = ", ".join(f"{share:+.1%}" for share in sorted(more))
        click.echo(f"{length:6}  {pairs[0][0]:7.1f}  {statistics.median(more):+.1%} ({told})")


if __name__ == "__main__":
    main()
