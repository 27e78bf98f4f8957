"""What streaming heads cost in answers: scores of heads against one another, at equal stored bytes of the cache.

Every way keeps the same bytes at a length: heads that it ranks highest keep every token, the others sinks and a window;
"uniform" gives all heads one window of these bytes; "random" draws the heads, by seed. Perplexity is of windows of that
length that are read at once with exact masks, passkeys are asked for behind a prompt of that length, and "dense" is the
model as it is. Scores that need gradients (influence, gates) come from the profile of a run. Finished plans
(`attention_plan.json` of an artifact, e.g. of the recipe moa) are measured beside them, at their own bytes.

    python benchmarks/heads_quality.py --model MODEL --text TEST.txt [--length 4096] [--windows 2]
        [--retention 0.5,0.25] [--scores induction,retrieval,distant,mean_qk] [--profile head_profile.json]
        [--plan moa=OUT/attention_plan.json] [--seeds 0,1,2] [--questions 10] [--json FILE]
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from compress.calibrate.text import open_text
from compress.evalsuite.longcontext import LongContextSettings
from heads_ways import (
    Way,
    all_heads,
    full_layers,
    keeping,
    named,
    passkeys,
    rule_from,
    stored_share,
    streaming_options,
)
from torch import Tensor

import compress
from compress.heads.profile import read_profile
from compress.heads.scores import ScoreSettings, score
from compress.heads.select import Budget, how_many, rank, streaming_plan
from compress.plan import AttentionPlan, Window
from compress.plan_writer import Rule
from compress.runtime.attention import NAME
from compress.runtime.plan_cache import PlanCache


def uniform(config: Any, rule: Rule, budget: Budget) -> AttentionPlan:
    """All heads see the same window, as long as the bytes allow."""
    span = int(budget.retention * budget.tokens) - rule.sink
    return streaming_plan(config, Rule(rule.sink, Window(a=span // 64 * 64, b=0.0)), ())


def ways(args: argparse.Namespace, config: Any, scores: dict[str, Tensor], retention: float) -> Iterator[Way]:
    """All that are compared at one retention."""
    rule = rule_from(args.sink, args.recent)
    budget = Budget(retention, args.length, rule)
    count = how_many(config, budget)
    yield Way("uniform", uniform(config, rule, budget))
    for name, values in scores.items():
        yield keeping(name, config, rule, rank(values, full_layers(config)).heads[:count])
    for seed in args.seeds:
        yield keeping(f"random {seed}", config, rule, Random(seed).sample(all_heads(config), count))


def finished(args: argparse.Namespace, config: Any) -> list[Way]:
    """Plans that are there already, checked against the model."""
    found = [Way(name, AttentionPlan.from_json(json.loads(path.read_text()), str(path))) for name, path in args.plan]
    for way in found:
        way.plan.check(config)
    return found


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
    parser.add_argument("--plan", type=named, action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=10)
    streaming_options(parser)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    model, tokenizer = compress.load(args.model)
    own = [Way("dense", AttentionPlan.empty(model.config)), *finished(args, model.config)]
    scores = taken(args, model, tokenizer)
    model.set_attn_implementation(NAME)
    text = "\n\n".join(open_text(args.text, option="--text").documents)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: args.windows * args.length])
    windows = ids.view(args.windows, args.length)
    asked = LongContextSettings(lengths=(args.length,), depths=args.questions)
    todo = [(stored_share(way.plan, model.config, args.length), way) for way in own]
    for share in map(float, args.retention.split(",")):
        todo += [(share, way) for way in ways(args, model.config, scores, share)]
    rows: list[dict[str, Any]] = []
    print("retention  way          stored  perplexity        passkey", flush=True)
    for retention, way in todo:
        stored = stored_share(way.plan, model.config, args.length)
        ppl, found = perplexity(model, windows, way.plan), fmean(passkeys(model, tokenizer, way.plan, asked))
        base = rows[0]["perplexity"] if rows else ppl
        more = ppl / base - 1
        rows.append({"retention": retention, "way": way.name, "stored": stored, "perplexity": ppl, "passkey": found})
        print(f"{retention:9.3g}  {way.name:11}  {stored:.3f}  {ppl:7.3f} ({more:+.1%})  {found:.2f}", flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
