"""What streaming heads cost in answers: scores of heads against one another, at equal stored bytes of the cache.

Every way keeps the same bytes at a length: heads that it ranks highest keep every token, the others sinks and a window;
"uniform" gives all heads one window of these bytes; "random" draws the heads, by seed. Perplexity is of windows of that
length that are read at once with exact masks, passkeys are asked for behind a prompt of that length, and "dense" is the
model as it is. Scores that need
gradients (influence, gates) come from the profile of a run.

    python benchmarks/heads_quality.py --model MODEL --text TEST.txt [--length 4096] [--windows 2]
        [--retention 0.5,0.25] [--scores induction,retrieval,distant,mean_qk] [--profile head_profile.json]
        [--seeds 0,1,2] [--questions 10] [--json FILE]
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from compress.calibrate.text import open_text
from compress.evalsuite.longcontext import LongContextSettings, long_context, results
from torch import Tensor

import compress
from compress.fingerprint import fingerprint_of
from compress.heads.profile import read_profile
from compress.heads.scores import ScoreSettings, score
from compress.heads.select import Budget, Head, dense_bytes, how_many, rank, streaming_plan
from compress.plan import AttentionPlan, Window
from compress.plan_compile import predict_bytes
from compress.plan_writer import Rule
from compress.runtime.attention import NAME
from compress.runtime.plan_cache import PlanCache


@dataclass(frozen=True)
class Way:
    """A plan and what tables call it."""

    name: str
    plan: AttentionPlan


def uniform(config: Any, rule: Rule, budget: Budget) -> AttentionPlan:
    """All heads see the same window, as long as the bytes allow."""
    span = int(budget.retention * budget.tokens) - rule.sink
    return streaming_plan(config, Rule(rule.sink, Window(a=span // 64 * 64, b=0.0)), ())


def ways(args: argparse.Namespace, config: Any, scores: dict[str, Tensor], retention: float) -> Iterator[Way]:
    """All that are compared at one retention."""
    rule = Rule(args.sink, Window(a=args.recent, b=0.0))
    budget = Budget(retention, args.length, rule)
    count, mark = how_many(config, budget), fingerprint_of(config)
    heads: list[Head] = [(n, k) for n in range(mark.layers) if n not in mark.sliding for k in range(mark.kv_heads)]
    yield Way("uniform", uniform(config, rule, budget))
    for name, values in scores.items():
        full = tuple(sorted({layer for layer, _ in heads}))
        yield Way(name, streaming_plan(config, rule, rank(values, full).heads[:count]))
    for seed in args.seeds:
        yield Way(f"random {seed}", streaming_plan(config, rule, tuple(Random(seed).sample(heads, count))))


def perplexity(model: Any, windows: Tensor, plan: AttentionPlan) -> float:
    """Of windows [n, length], read at once."""
    total, count = 0.0, 0
    for ids in windows:
        cache = PlanCache(model.config, plan)
        hidden = model.base_model(input_ids=ids[None], past_key_values=cache).last_hidden_state[0]
        for start in range(0, len(ids) - 1, 512):
            rows = slice(start, min(start + 512, len(ids) - 1))
            logits = model.lm_head(hidden[rows]).float()
            total += float(F.cross_entropy(logits, ids[rows.start + 1 : rows.stop + 1], reduction="sum"))
            count += rows.stop - rows.start
    return math.exp(total / count)


def passkeys(args: argparse.Namespace, model: Any, tokenizer: Any, plan: AttentionPlan) -> float:
    """Share of questions that are answered."""
    settings = LongContextSettings(lengths=(args.length,), depths=args.questions, samples=1)
    cells = long_context(model, tokenizer, ["passkey"], settings, cache=partial(PlanCache, model.config, plan))
    return results(cells)[0].score


def taken(args: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Tensor]:
    """Scores by name, [layers, KV heads]."""
    settings = ScoreSettings(lengths=(1024,))
    found = {}
    for name in filter(None, args.scores.split(",")):
        started = time.perf_counter()
        found[name] = score(name, model, tokenizer, settings)
        print(f"score {name}: {time.perf_counter() - started:.0f} s", flush=True)
    if args.profile is not None:
        profile = read_profile(args.profile)
        profile.check(model.config)
        found |= {name: torch.tensor(values) for name, values in profile.scores.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--retention", default="0.5")
    parser.add_argument("--scores", default="induction,retrieval,distant,mean_qk")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--sink", type=int, default=64)
    parser.add_argument("--recent", type=int, default=256)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model, tokenizer = compress.load(args.model)
    scores = taken(args, model, tokenizer)
    model.set_attn_implementation(NAME)
    text = "\n\n".join(open_text(args.text, option="--text").documents)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: args.windows * args.length])
    windows = ids.view(args.windows, args.length)
    dense = Way("dense", AttentionPlan.empty(model.config))
    full, rows = dense_bytes(model.config, args.length), []
    print("retention  way          stored  perplexity        passkey", flush=True)
    base = 0.0
    for retention, way in [(1.0, dense)] + [
        (share, way)
        for share in map(float, args.retention.split(","))
        for way in ways(args, model.config, scores, share)
    ]:
        stored = predict_bytes(way.plan, model.config, args.length).stored / full
        ppl, found = perplexity(model, windows, way.plan), passkeys(args, model, tokenizer, way.plan)
        base = base or ppl
        rows.append({"retention": retention, "way": way.name, "stored": stored, "perplexity": ppl, "passkey": found})
        print(
            f"{retention:9}  {way.name:11}  {stored:.3f}  {ppl:7.3f} ({ppl / base - 1:+.1%})  {found:.2f}", flush=True
        )
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
