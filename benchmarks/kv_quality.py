"""What a KV cache's packing costs in answers: every way at equal allocated bytes, and what each part of ours earns.

A window's first half fills the cache at once, the rest follows in chunks and is scored: KL from the dense cache, the
share of equal likeliest tokens, perplexity. Seeds choose windows and probes. Bytes are those of the cache at the end of
a window; schemes that would occupy less than ``zipcache-plus`` keep more recent tokens in 16 bits, those that occupy
more are marked.

    python benchmarks/kv_quality.py --model MODEL --text TEST.txt [--lengths 2048,4096] [--windows 2] [--seeds 0,1,2]
        [--methods zipcache-plus,zipcache,kivi-2,...] [--parts quality,ablation,saliency,passkey,generated]
        [--json FILE]
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from compress.calibrate.text import open_text
from compress.evalsuite.longcontext import LongContextSettings, long_context
from compress.evalsuite.scan import States, scan
from compress.evalsuite.sliding import Feed, Windows
from compress.kernels.attention_mass import attention_mass
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from compress.kv.attention import NAME
from compress.kv.copying import Place, best, copying_scores, how_many
from compress.kv.filling import Shape, filled_bytes, match
from compress.kv.saliency import probe_rows, prompt_mass, salient, witnesses
from compress.kv.schemes import DENSE, Scheme, from_settings, named
from compress.model import open_model
from compress.plan import Packing
from compress.recipe import Recipe
from compress.runtime import find

SUBJECT = "zipcache-plus"
METHODS = (SUBJECT, "zipcache", "kivi-2", "uniform-2", "uniform-4", "k4v2", "k4v2-plus", "quanto-2", "quanto-4")
PARTS = ("quality", "ablation", "saliency", "passkey", "generated")
ABLATIONS: dict[str, dict[str, Any]] = {
    "without clip search": {"clip": False},
    "without centring": {"center": False},
    "without rotation": {"rotate": False},
    "without sinks": {"sinks": 0},
    "without copying heads": {"copying_heads": 0.0},
    "without boundary layers": {"boundary_bits": None},
    "official normalizer": {"normalizer": "official"},
    "r = 0": {"ratio": 0.0},
    "r = 0.1": {"ratio": 0.1},
    "r = 0.25": {},
    "r = 0.3": {"ratio": 0.3},
    "r = 0.6": {"ratio": 0.6},
    "r = 1": {"ratio": 1.0},
}
GENERATED, GENERATED_CHUNK = 256, 16
OBSERVED = "compress_kv_quality"


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass
class Row:
    """A way to keep the cache, over all seeds."""

    name: str
    length: int
    nbytes: int
    ratio: float
    equal: bool
    more: int = 0
    kl: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)
    perplexity: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Bench:
    """A model, a text, and how they are measured."""

    model: Any
    tokenizer: Any
    ids: Tensor
    windows: int
    chunk: int
    seeds: tuple[int, ...]
    copying: list[Place]

    @property
    def shape(self) -> Shape:
        """Of keys and values."""
        return Shape.of(self.model.config)

    def text(self, length: int, seed: int) -> Tensor:
        """Windows from all over the text, none overlapping another, one behind the other."""
        places = torch.randperm(len(self.ids) // length, generator=torch.Generator().manual_seed(seed))
        if len(places) < self.windows:
            raise SystemExit(f"the text has {len(places)} windows of {length} tokens, {self.windows} are asked for")
        chosen = places[: self.windows].tolist()
        return torch.cat([self.ids[place * length : (place + 1) * length] for place in chosen])

    def rows(self, length: int, schemes: Callable[[int], list[Scheme]], matched: bool) -> list[Row]:
        """Every scheme on the same windows; the first one's bytes are what the others are matched with."""
        feed = Feed(length // 2, self.chunk)
        sizes, cut = feed.sizes(length), Windows(length, None, self.windows, feed)
        rows = self._sized(schemes(0), length, sizes, matched)
        for seed in self.seeds:
            self.score(self.text(length, seed), cut, [(row, one) for row, one in zip(rows, schemes(seed), strict=True)])
        return rows

    def score(self, ids: Tensor, cut: Windows, rows: list[tuple[Row, Scheme]]) -> None:
        """The dense cache once, then every scheme against it."""
        with tempfile.TemporaryDirectory() as folder:
            states = States(Path(folder) / "states")
            started = time.perf_counter()
            config = self.model.config
            dense = scan(self.model, ids, cut, cache=lambda: DynamicCache(config=config), states=states)
            tokens = sum(cut.scored)
            tell(f"  {cut.name}: dense {math.exp(sum(x.nll for x in dense) / tokens):.3f}, "
                 f"{time.perf_counter() - started:.0f} s")  # fmt: skip
            for row, scheme in rows:
                started = time.perf_counter()
                found = scan(self.model, ids, cut, cache=maker(scheme, row.more), states=states)
                row.kl.append(sum(x.kl or 0.0 for x in found) / tokens)
                row.top1.append(sum(x.agreed or 0 for x in found) / tokens)
                row.perplexity.append(math.exp(sum(x.nll for x in found) / tokens))
                tell(f"  {cut.name}: {row.name} KL {row.kl[-1]:.4f}, top-1 {row.top1[-1]:.2%}, "
                     f"perplexity {row.perplexity[-1]:.3f}, {time.perf_counter() - started:.0f} s")  # fmt: skip

    def _sized(self, schemes: list[Scheme], length: int, sizes: list[int], matched: bool) -> list[Row]:
        dense = filled_bytes(DynamicCache(config=self.model.config), self.shape, [length]).allocated
        wanted, rows = 0, []
        for scheme in schemes:
            if scheme.name == DENSE:
                rows.append(Row(DENSE, length, dense, 1.0, False))
                continue
            found = match(scheme, self.shape, sizes, wanted) if wanted and matched else None
            nbytes = filled_bytes(maker(scheme, 0)(), self.shape, sizes) if found is None else found.nbytes
            wanted = wanted or nbytes.allocated
            equal = abs(nbytes.allocated / wanted - 1) <= 0.01
            more = 0 if found is None else found.more
            rows.append(Row(scheme.name, length, nbytes.allocated, dense / nbytes.allocated, equal, more))
        return rows


def maker(scheme: Scheme, more: int) -> Callable[[], Cache]:
    make = scheme.make
    assert make is not None
    return lambda: make(more)


def plus(bench: Bench, changes: dict[str, Any], name: str, seed: int) -> Scheme:
    """``zipcache-plus`` with other settings."""
    settings = Recipe.load(SUBJECT).kv
    assert settings is not None
    return from_settings(name, "", bench.model.config, settings.model_copy(update=changes), seed, bench.copying)


def quality(bench: Bench, length: int, methods: list[str]) -> list[Row]:
    def schemes(seed: int) -> list[Scheme]:
        return [scheme for scheme in named(methods, bench.model.config, seed, bench.copying) if scheme.make is not None]

    return bench.rows(length, schemes, matched=True)


def ablation(bench: Bench, length: int) -> list[Row]:
    """One part of ours less at a time, at its own bytes."""

    def schemes(seed: int) -> list[Scheme]:
        whole = plus(bench, {}, SUBJECT, seed)
        return [whole, *(plus(bench, changes, name, seed) for name, changes in ABLATIONS.items() if changes)]

    return bench.rows(length, schemes, matched=False)


def generated(bench: Bench, length: int, methods: list[str]) -> list[Row]:
    """Along the dense model's own greedy answers behind prompts of half the length."""
    prompt = length // 2
    whole = prompt + GENERATED
    feed = Feed(prompt, GENERATED_CHUNK)

    def schemes(seed: int) -> list[Scheme]:
        return [scheme for scheme in named(methods, bench.model.config, seed, bench.copying) if scheme.make is not None]

    rows = bench._sized(schemes(0), whole, feed.sizes(whole), True)
    for seed in bench.seeds:
        text = bench.text(length, seed).view(bench.windows, length)[:, :prompt]
        answers = [greedy(bench.model, one) for one in text]
        ids = torch.cat([torch.cat([one, answer]) for one, answer in zip(text, answers, strict=True)])
        bench.score(ids, Windows(whole, None, bench.windows, feed), list(zip(rows, schemes(seed), strict=True)))
    return rows


@torch.no_grad()
def greedy(model: Any, prompt: Tensor) -> Tensor:
    """The likeliest token again and again, whatever it is, so that all answers are equally long."""
    past, fed, said = DynamicCache(config=model.config), prompt[None].to(model.device), []
    for _ in range(GENERATED):
        fed = model(fed, past_key_values=past, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        said.append(int(fed))
    return torch.tensor(said)


@contextmanager
def watched(model: Any, look: Callable[[int, Tensor, Tensor, float], None]) -> Iterator[None]:
    """Calls ``look(layer, query, key, scaling)`` in every attention of a model."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        look(module.layer_idx, query, key, kwargs.get("scaling") or query.shape[-1] ** -0.5)
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register(OBSERVED, attention)
    AttentionMaskInterface.register(OBSERVED, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(OBSERVED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def saliency(bench: Bench, length: int) -> list[dict[str, Any]]:
    """Share of full attention's choice that 10 % probes find, mean over layers, heads, windows and seeds."""
    found: dict[tuple[str, float], list[float]] = {}

    def overlaps(seed: int) -> Callable[[int, Tensor, Tensor, float], None]:
        def look(layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
            rows = torch.arange(length)
            whole = attention_mass(query, key, rows, scaling).view(1, key.shape[1], -1, length).sum(2)
            whole = whole / witnesses(rows, length, official=False)
            for name, packing in (
                ("5 % recent, 5 % random", Packing(probe_recent=0.05, probe_random=0.05, probe_cap=0, seed=seed)),
                ("10 % random", Packing(probe_recent=0.0, probe_random=0.1, probe_cap=0, seed=seed)),
                ("zipcache-plus", Packing(seed=seed)),
                (
                    "5 % + 5 %, official normalizer",
                    Packing(probe_recent=0.05, probe_random=0.05, probe_cap=0, normalizer="official", seed=seed),
                ),
            ):
                probes = probe_rows(length, packing, layer)
                mass = prompt_mass(query, key, probes, scaling)
                score = mass / witnesses(probes, length, packing.normalizer == "official").clamp(min=1)
                for share in (0.3, 0.6):
                    chosen, wanted = salient(score, share), salient(whole, share)
                    both = (chosen & wanted).sum(-1).double() / wanted.sum(-1)
                    found.setdefault((name, share), []).append(float(both.mean()))

        return look

    for seed in bench.seeds:
        with torch.no_grad(), watched(bench.model, overlaps(seed)):
            for ids in bench.text(length, seed).view(bench.windows, length):
                bench.model.base_model(ids[None].to(bench.model.device), use_cache=False)
        tell(f"  saliency at {length}: seed {seed}")
    return [
        {"length": length, "probes": name, "share": share, "overlap": fmean(values), "least_layer": min(values)}
        for (name, share), values in found.items()
    ]


def passkey(bench: Bench, rows: list[Row], methods: list[str], samples: int) -> list[dict[str, Any]]:
    """Found keys by length, the question coming through the cache."""
    more = {(row.name, row.length): row.more for row in rows}
    found = []
    for length in sorted({row.length for row in rows}):
        for scheme in named([DENSE, *methods], bench.model.config, 0, bench.copying):
            if scheme.make is None:
                continue
            settings = LongContextSettings((length,), depths=5, samples=samples)
            make = maker(scheme, more.get((scheme.name, length), 0))
            cells = long_context(bench.model, bench.tokenizer, ["passkey"], settings, cache=make)
            score = fmean(cell.score for cell in cells)
            found.append({"length": length, "name": scheme.name, "score": score, "n": sum(c.n for c in cells)})
            tell(f"  passkey at {length}: {scheme.name} {score:.0%}")
    return found


def table(title: str, rows: list[Row]) -> list[str]:
    lines = [f"\n{title}\n", "| cache | tokens | allocated MB | ratio | more 16-bit tokens | KL | top-1 | perplexity |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        name = row.name if row.equal or row.name == DENSE else f"{row.name} (other bytes)"
        cells = [spread(row.kl, ".4f"), spread(row.top1, ".2%"), spread(row.perplexity, ".3f")]
        size = f"{row.nbytes / 1e6:.2f} | {row.ratio:.2f}x | {row.more}"
        lines.append(f"| {name} | {row.length:,} | {size} | {' | '.join(cells)} |")
    return lines


def spread(values: list[float], form: str) -> str:
    """Mean over seeds, and their standard deviation."""
    return f"{fmean(values):{form}}" + (f" ± {stdev(values):{form}}" if len(values) > 1 else "")


def plain(title: str, entries: list[dict[str, Any]]) -> list[str]:
    if not entries:
        return []
    lines = [f"\n{title}\n", "| " + " | ".join(entries[0]) + " |", "|" + "---|" * len(entries[0])]
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in entry.values()] for entry in entries]
    return lines + [f"| {' | '.join(row)} |" for row in cells]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True, help="a text file")
    parser.add_argument("--lengths", default="2048,4096")
    parser.add_argument("--windows", type=int, default=2, help="for each seed")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"{SUBJECT} first: its bytes are the measure")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--chunk", type=int, default=64)
    parser.add_argument("--samples", type=int, default=2, help="passkeys for each length and depth")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def copying_heads(model: str) -> list[Place]:
    """The heads that a run of ``zipcache-plus`` would find."""
    settings, view = Recipe.load(SUBJECT).kv, open_model(model)
    assert settings is not None
    scores = copying_scores(view, torch.device("cpu"))
    layers = [layer for layer in range(view.num_layers) if view.window(layer) is None]
    return best(scores, how_many(settings.copying_heads, len(layers) * scores.shape[1]), layers)


def main() -> None:
    """Measure, print tables, write JSON."""
    asked = arguments()
    methods, parts = asked.methods.split(","), asked.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"--parts: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    found = find(asked.model)
    model = found.load(torch.float32).to(asked.device).eval()
    model.set_attn_implementation(NAME)
    named(methods, model.config)
    text = "\n\n".join(open_text(asked.text, option="--text").documents)
    ids = torch.tensor(found.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    seeds = tuple(map(int, asked.seeds.split(",")))
    bench = Bench(model, found.tokenizer, ids, asked.windows, asked.chunk, seeds, copying_heads(asked.model))
    lengths = [int(length) for length in asked.lengths.split(",")]
    rows: dict[str, list[Row]] = {"quality": [], "ablation": [], "generated": []}
    facts: dict[str, list[dict[str, Any]]] = {"saliency": [], "passkey": []}
    for length in lengths:
        tell(f"{length} tokens")
        if "saliency" in parts:
            facts["saliency"] += saliency(bench, length)
        if "quality" in parts:
            rows["quality"] += quality(bench, length, methods)
        if "ablation" in parts:
            rows["ablation"] += ablation(bench, length)
        if "generated" in parts:
            rows["generated"] += generated(bench, length, methods)
    if "passkey" in parts:
        sized = rows["quality"] or [Row(SUBJECT, length, 0, 0.0, True) for length in lengths]
        facts["passkey"] = passkey(bench, sized, methods, asked.samples)
    titles = {"quality": "Teacher-forced, at equal bytes", "ablation": "One part less", "generated": "Own answers"}
    for part, own in rows.items():
        if own:
            print("\n".join(table(titles[part], own)))
    for part, entries in facts.items():
        print("\n".join(plain(part, entries)))
    if asked.json is not None:
        everything = {"arguments": {k: str(v) for k, v in vars(asked).items()}, **facts}
        everything |= {part: [asdict(row) for row in own] for part, own in rows.items()}
        asked.json.write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
