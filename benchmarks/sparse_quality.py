"""What searching for far tokens costs in answers: searches against one another, at equal budgets and for equal heads.

OUT is an artifact with a section `sparse`; its plan says which heads search. Every way is for these heads: `sea` by
the estimators of OUT, the others (`hip`, `quest`, `block_mean`) without any; `window` sees the sinks and as many newest
tokens as the others see in all; `random` as many blocks as hip, anywhere (recall only). "answers" has perplexity and KL
divergence from dense attention on windows of a text, read at once, processor seconds of that, and passkeys; "recall"
the share of the true attention that the rows see, by layer, for rows that don't see everything.

    python benchmarks/sparse_quality.py OUT --text TEST.txt [--ways hip,quest,block_mean,window,random] [--length 4096]
        [--windows 2] [--questions 5] [--k 512] [--window 128] [--sink 16] [--parts answers,recall] [--json FILE]

What is in FILE isn't measured again, so that a run that was stopped goes on.
"""

import argparse
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from compress.calibrate.text import open_text
from compress.evalsuite.longcontext import LongContextSettings, long_context, results
from compress.kernels.block_attention import BlockList
from heads_ways import Kept
from torch import Tensor

import compress
from compress.kv.attention import NAME
from compress.plan import AttentionPlan, Head, TopK, Window, with_heads
from compress.runtime.plan_cache import PlanCache
from compress.sparse.finder import finder
from compress.sparse.recall import recall
from compress.sparse.sea_file import Learned
from compress.tap import NAME as TAP
from compress.tap import Seen

ROWS = 512


def as_asked(plan: AttentionPlan, args: argparse.Namespace, policy: str) -> AttentionPlan:
    """The artifact's plan with another policy and budget; gate 0."""
    assert plan.search is not None
    search = replace(plan.search, sink=args.sink, window=args.window, gate=0)
    if policy == "window":
        rule = Head(sink=args.sink, window=Window(a=args.window + args.k, b=0.0))
    else:
        rule = Head(topk=TopK(args.k, policy))
    layers = [
        with_heads(layer, {number: rule for number, head in enumerate(layer.heads) if head.topk is not None})
        for layer in plan.layers
    ]
    return replace(plan, layers=tuple(layers), search=search)


def answers(model: Any, tokenizer: Any, args: argparse.Namespace, plan: AttentionPlan) -> dict[str, Any]:
    """Perplexity, divergence, seconds and passkeys."""
    loss = divergence = seconds = 0.0
    for ids in windows(tokenizer, args):
        states = []
        for made in (AttentionPlan.empty(model.config), plan):
            start = time.process_time()
            states.append(model.base_model(input_ids=ids[None], past_key_values=PlanCache(model.config, made))[0][0])
            seconds += time.process_time() - start if made is plan else 0.0
        for first in range(0, len(ids) - 1, ROWS):
            rows = slice(first, min(first + ROWS, len(ids) - 1))
            dense, own = (model.lm_head(held[rows]).float().log_softmax(-1) for held in states)
            loss += float(F.nll_loss(own, ids[rows.start + 1 : rows.stop + 1], reduction="sum"))
            divergence += float((dense.exp() * (dense - own)).sum())
    count = args.windows * (args.length - 1)
    found: dict[str, Any] = {
        "perplexity": math.exp(loss / count),
        "divergence": divergence / count,
        "seconds": seconds / args.windows,
    }
    if args.questions:
        settings = LongContextSettings(lengths=(args.length,), depths=args.questions)
        cells = long_context(model, tokenizer, ["passkey"], settings, cache=partial(PlanCache, model.config, plan))
        (result,) = results(cells)
        found["passkey"] = fmean(result.scores)
    return found


def windows(tokenizer: Any, args: argparse.Namespace) -> Tensor:
    text = "\n\n".join(open_text(str(args.text), option="--text").documents)
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: args.windows * args.length])
    return ids.view(args.windows, args.length)


def anywhere(blocks: BlockList, length: int) -> BlockList:
    """Lists of the same lengths, of random blocks before the window."""
    generator, starts = torch.Generator().manual_seed(0), blocks.starts.clone()
    for index in range(starts.shape[2]):
        far = index * blocks.block_q - blocks.window + 1
        grid = torch.arange(blocks.sink, max(blocks.sink, far - blocks.block_k + 1), blocks.block_k)
        for head in range(starts.shape[1]):
            count = int(blocks.counts[0, head, index])
            drawn = grid[torch.randperm(len(grid), generator=generator)[:count]].sort().values
            starts[0, head, index, :count] = drawn.to(torch.int32)
    return replace(blocks, starts=starts)


def recalls(model: Any, tokenizer: Any, args: argparse.Namespace, plan: AttentionPlan) -> list[dict[str, Any]]:
    """Of every layer and way."""
    search, learned, rows = as_asked(plan, args, "hip").search, plan.estimators, []
    assert search is not None
    first = args.sink + args.window + args.k

    def listed(way: str, seen: Seen) -> BlockList:
        policy = "hip" if way in ("window", "random") else way
        estimator = learned.estimator(seen.layer) if isinstance(learned, Learned) else None
        searching = finder(TopK(args.k, policy), search, 0, estimator)
        blocks = searching.prompt(seen.query, seen.key, seen.value, args.length)
        assert blocks is not None
        if way == "window":
            return replace(blocks, counts=torch.zeros_like(blocks.counts), window=args.window + args.k)
        return anywhere(blocks, args.length) if way == "random" else blocks

    def tap(seen: Seen) -> Tensor:
        heads = [number for number, head in enumerate(plan.layers[seen.layer].heads) if head.topk is not None]
        if heads:
            own = seen.of(heads)
            shares = {
                way: float(recall(own.query, own.key, listed(way, own), own.scaling)[..., first:].mean())
                for way in args.ways
            }
            rows.append({"layer": seen.layer} | shares)
            print(f"  recall, layer {seen.layer}: {shares}", flush=True)
        return seen.attend()

    model.set_attn_implementation(TAP)
    model.base_model(input_ids=windows(tokenizer, args)[:1], tap=tap, use_cache=False)
    return rows


def table(names: list[str], rows: list[list[str]]) -> None:
    print("\n| " + " | ".join(names) + " |\n|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--ways", type=lambda text: text.split(","), default=["hip", "quest", "block_mean", "window"])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--questions", type=int, default=5)
    parser.add_argument("--k", type=int, default=512)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--sink", type=int, default=16)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=["answers", "recall"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    model, tokenizer = compress.load(args.artifact)
    plan: AttentionPlan = model.attention_plan
    if "sea" not in plan.searches:
        args.ways = [way for way in args.ways if way != "sea"]
    mark = hashlib.sha256(Path(args.artifact, "attention_plan.json").read_bytes() + args.text.read_bytes()).hexdigest()
    told = {name: getattr(args, name) for name in ("length", "windows", "questions", "k", "window", "sink")}
    kept = Kept(args.json, {"artifact and text": mark} | told)
    if "answers" in args.parts:
        model.set_attn_implementation(NAME)
        found = {}
        for way in ["dense", *(way for way in args.ways if way != "random")]:
            own = AttentionPlan.empty(model.config) if way == "dense" else as_asked(plan, args, way)
            measure: Callable[[], Any] = partial(answers, model, tokenizer, args, own)
            found[way] = kept.of(f"answers {way}", measure)
            print(f"  {way}: {found[way]}", flush=True)
        rows = [
            [
                way,
                f"{own['perplexity']:.3f} ({own['perplexity'] / found['dense']['perplexity'] - 1:+.1%})",
                f"{own['divergence']:.4f}",
                f"{own['seconds']:.1f}",
                f"{found['dense']['seconds'] / own['seconds']:.2f}",
                f"{own.get('passkey', math.nan):.2f}",
            ]
            for way, own in found.items()
        ]
        table(["search", "perplexity", "KL", "prompt s", "x dense", "passkey"], rows)
    if "recall" in args.parts:
        layers = kept.of(f"recall {','.join(args.ways)}", partial(recalls, model, tokenizer, args, plan))
        rows = [[str(row["layer"]), *(f"{row[way]:.3f}" for way in args.ways)] for row in layers]
        rows.append(["mean", *(f"{fmean(row[way] for row in layers):.3f}" for way in args.ways)])
        table(["layer", *args.ways], rows)


if __name__ == "__main__":
    main()
