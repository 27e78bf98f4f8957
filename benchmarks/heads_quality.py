"""What streaming heads cost in answers: scores of heads against one another, at equal stored bytes of the cache.

Every way keeps the same bytes at a length: heads that it ranks highest keep every token, the others sinks and a window;
"uniform" gives all heads one window of these bytes; "random" draws the heads anew for every seed. Perplexity is of
windows of that length that are read at once with exact masks, passkeys are asked for behind a prompt of that length,
other ones for every seed, and "dense" is the model as it is. Scores that need gradients (influence, gates) come from
the profile of a run. Finished plans (`attention_plan.json` of an artifact, e.g. of the recipe moa) are measured beside
them, at their own bytes. A row has means over seeds and the standard deviation between them.

    python benchmarks/heads_quality.py --model MODEL --text TEST.txt [--length 4096] [--windows 2]
        [--ways uniform,random] [--retention 0.5,0.25] [--scores induction,retrieval,distant,mean_qk]
        [--profile head_profile.json] [--plan moa=OUT/attention_plan.json] [--seeds 0,1,2] [--questions 10]
        [--threads 1] [--json FILE]

What is in FILE isn't measured again, so that a run that was stopped goes on. Scores that the profile has aren't
measured; `--scores ""` takes all of the profile, and none without one.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from statistics import fmean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from compress.calibrate.text import open_text
from compress.evalsuite.longcontext import LongContextSettings
from heads_ways import (
    Kept,
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
from compress.fingerprint import fingerprint_of
from compress.heads.profile import read_profile
from compress.heads.scores import ScoreSettings, score
from compress.heads.select import Budget, how_many, rank, streaming_plan
from compress.kv.attention import NAME
from compress.plan import AttentionPlan, Window
from compress.plan_writer import Rule
from compress.runtime.plan_cache import PlanCache

FIGURES = ("perplexity", "passkey")


def uniform(config: Any, rule: Rule, budget: Budget) -> AttentionPlan:
    """All heads see the same window, as long as the bytes allow."""
    span = int(budget.retention * budget.tokens) - rule.sink
    return streaming_plan(config, Rule(rule.sink, Window(a=span // 64 * 64, b=0.0)), ())


def ways(args: argparse.Namespace, config: Any, scores: dict[str, Tensor], retention: float) -> Iterator[list[Way]]:
    """All that are compared at one retention, one plan for all seeds or one for each."""
    rule = rule_from(args.sink, args.recent)
    budget = Budget(retention, args.length, rule)
    count = how_many(config, budget)
    if "uniform" in args.ways:
        yield [Way("uniform", uniform(config, rule, budget))]
    for name, values in scores.items():
        yield [keeping(name, config, rule, rank(values, full_layers(config)).heads[:count])]
    if "random" in args.ways:
        drawn = (Random(seed).sample(all_heads(config), count) for seed in args.seeds)
        yield [keeping("random", config, rule, heads) for heads in drawn]


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


def taken(args: argparse.Namespace, kept: Kept, model: Any, tokenizer: Any) -> dict[str, Tensor]:
    """Scores by name, [layers, KV heads]."""
    settings, names = ScoreSettings(lengths=(1024,)), list(filter(None, args.scores.split(",")))
    known: dict[str, Tensor] = {}
    if args.profile is not None:
        profile = read_profile(args.profile)
        profile.check(model.config)
        known = {name: torch.tensor(values) for name, values in profile.scores.items()}
    found = {name: known[name] for name in (names or known) if name in known}
    for name in (name for name in names if name not in known):
        values = kept.of(f"score {name}", lambda name=name: score(name, model, tokenizer, settings).tolist())  # type: ignore[misc]
        found[name] = torch.tensor(values)
    return found


class Measured:
    """What ways cost, each figure kept as soon as it is there.

    Args:
        args: of the command line.
        kept: where figures are kept, by the plan.
        model: attends by plans.
        tokenizer: the model's.
    """

    def __init__(self, args: argparse.Namespace, kept: Kept, model: Any, tokenizer: Any) -> None:
        self.args, self.kept, self.model, self.tokenizer = args, kept, model, tokenizer
        text = "\n\n".join(open_text(str(args.text), option="--text").documents)
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: args.windows * args.length])
        self.windows = ids.view(args.windows, args.length)

    def row(self, retention: float | None, own: list[Way]) -> dict[str, Any]:
        """Of one way, with one plan for all seeds or one for each."""
        seeds = self.args.seeds
        plans = own * len(seeds) if len(own) == 1 else own
        found = {
            "perplexity": [self._perplexity(way) for way in own],
            "passkey": [self._passkeys(way, seed) for way, seed in zip(plans, seeds, strict=True)],
        }
        stored = stored_share(own[0].plan, self.model.config, self.args.length)
        row: dict[str, Any] = {"retention": retention or stored, "way": own[0].name, "stored": stored, "by_seed": found}
        for name, values in found.items():
            row |= {name: fmean(values), f"{name}_sd": stdev(values) if len(values) > 1 else None}
        return row

    def _perplexity(self, way: Way) -> float:
        key = f"perplexity of {self.args.windows} windows of {self.args.length} tokens, plan {way.mark}"
        told = f"perplexity {way.name}"
        found: float = self.kept.of(key, lambda: perplexity(self.model, self.windows, way.plan), told)
        return found

    def _passkeys(self, way: Way, seed: int) -> float:
        asked = LongContextSettings(lengths=(self.args.length,), depths=self.args.questions, seed=seed)
        key = f"{self.args.questions} passkeys in {self.args.length} tokens, seed {seed}, plan {way.mark}"
        told = f"passkeys {way.name}, seed {seed}"
        return fmean(self.kept.of(key, lambda: list(passkeys(self.model, self.tokenizer, way.plan, asked)), told))


def line(row: dict[str, Any], dense: dict[str, Any]) -> str:
    """Of the table."""
    more = row["perplexity"] / dense["perplexity"] - 1
    spread, other = ("" if row[f"{name}_sd"] is None else f" ± {row[f'{name}_sd']:.2f}" for name in FIGURES)
    told = f"{row['perplexity']:7.3f}{spread} ({more:+.1%})"
    return f"{row['retention']:9.3g}  {row['way']:11}  {row['stored']:.3f}  {told:24}  {row['passkey']:.2f}{other}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--retention", default="0.5")
    parser.add_argument("--scores", default="induction,retrieval,distant,mean_qk")
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--plan", type=named, action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--seeds", type=lambda text: [int(n) for n in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument(
        "--ways", type=lambda text: text.split(","), default=["uniform", "random"], help="baselines beside scores"
    )
    parser.add_argument("--threads", type=int, default=1)
    streaming_options(parser)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(args.threads)
    model, tokenizer = compress.load(args.model)
    settings = {
        "model": [args.model, fingerprint_of(model.config).config_hash],
        "text": hashlib.sha256(args.text.read_bytes()).hexdigest(),
    }
    kept = Kept(args.json, settings)
    measured = Measured(args, kept, model, tokenizer)
    scores = taken(args, kept, model, tokenizer)
    model.set_attn_implementation(NAME)
    todo: list[tuple[float | None, list[Way]]] = [(None, [Way("dense", AttentionPlan.empty(model.config))])]
    todo += [(None, [way]) for way in finished(args, model.config)]
    for share in map(float, args.retention.split(",")):
        todo += [(share, own) for own in ways(args, model.config, scores, share)]
    rows = [measured.row(retention, own) for retention, own in todo]
    print("retention  way          stored  perplexity                passkey", flush=True)
    for row in rows:
        print(line(row, rows[0]), flush=True)
    kept.content["rows"] = rows
    kept.save()


if __name__ == "__main__":
    main()
