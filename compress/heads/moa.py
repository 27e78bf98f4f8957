"""MoA (arXiv 2406.14909): a window ``a + b N`` of its own for every KV head, N being the length of the text.

Rules are those of the paper's grid that differ, full attention, the window of a streaming head, and that with further
blocks at a fixed distance (S2-Attention, arXiv 2407.17678), shifted from layer to layer. What each costs is measured at
several lengths (``influence``), a programme picks one for every KV head (``solve``), and of its few candidates, one
window for all heads, and full and streaming heads (``simple_plans``) the one is taken whose answers have the least loss
on prompts that are longer than any that was profiled. Published plans are for query heads, which with grouped queries
needs a larger cache than full attention: ours are not.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from compress.evalsuite.head import evaluating
from compress.evalsuite.sliding import context_of
from compress.events import Message
from compress.fingerprint import fingerprint_of
from compress.heads.bins import placed
from compress.heads.data import Item
from compress.heads.influence import answer_loss, influence
from compress.heads.layers import Layers
from compress.heads.methods import Found, full_layers, rule_of, writer_of
from compress.heads.profiling import Profiler, Subject, prompts
from compress.heads.select import dense_bytes
from compress.heads.simple_plans import simple_plans
from compress.heads.solve import Choice, Floats, Problem, candidates, solve
from compress.kv.layer import Cluster, Handle, PlanLayer
from compress.kv.plain import PlainPart, Reach
from compress.model import ModelFacts
from compress.plan import BLOCK, AttentionPlan, Stride, Window
from compress.plan_writer import Rule
from compress.schema import Heads
from compress.tap import Seen, Tap

ALPHAS, BETAS = 6, 9  # of the paper's grid
FULL, STREAM = 0, 1  # numbers of these rules
BEYOND = 1.5  # length of the prompts that candidates are compared on, in units of the longest that was profiled
COMPARED = 2  # of these prompts, of each kind


def spans(profiler: Profiler, facts: ModelFacts, start: AttentionPlan | None) -> Found:
    """See the module's text.

    Args:
        profiler: of the model; keeps what is measured.
        facts: of the model.
        start: what others have planned.

    Raises:
        InputError: a budget that no rules keep to; the nearest is told.
    """
    settings = profiler.subject.settings
    rules = rules_of(settings)
    check(settings, facts.config)
    costs = _costs(profiler, facts, rules)
    layers = list(full_layers(facts))
    problem = _problem(settings, facts.config, costs[:, layers].double().numpy())
    problem = replace(problem, allowed=_allowed(profiler, problem, layers))
    found = candidates(problem, [f"{length:,} tokens" for length in sorted(settings.lengths)])
    known = {choice.rules for choice in found}
    found += [choice for choice in simple_plans(problem, FULL, STREAM) if choice.rules not in known]
    comparison = Comparison(profiler, rules, layers)
    losses = [comparison.loss(choice) for choice in found]
    best = min(range(len(found)), key=losses.__getitem__)
    writer = writer_of(profiler, facts, start)
    for layer, own in zip(layers, found[best].rules, strict=True):
        for head, rule in enumerate(own):
            if rule != FULL:
                writer.see(layer, head, placed(rules[rule], layer))
    writer.score(costs[..., STREAM].mean(0).tolist(), max(settings.lengths))
    budget = {"metric": "kv_bytes", "retention": settings.retention, "tokens": settings.budget_tokens}
    own_facts = {
        "rules": len(rules),
        "chosen": found[best].name,
        "compared_at": comparison.length,
        "dense_loss": comparison.loss(None),
        "candidates": [
            {
                "name": choice.name,
                "loss": loss,
                "gap": choice.gap,
                "costs": list(choice.costs),
                "densities": list(choice.densities),
            }
            for choice, loss in zip(found, losses, strict=True)
        ],
        "constrained": list(_constrained(settings)),
    }
    return Found(replace(writer.finish(), budget=budget), facts=own_facts)


def check(settings: Heads, config: PreTrainedConfig) -> None:
    """Whether shares of all heads with each rule could keep to the budget, whatever they cost.

    Raises:
        InputError: none could; the nearest budget that some keep to is told.
    """
    mark, layers = fingerprint_of(config), len(_full(config))
    problem = _problem(settings, config, np.zeros((1, layers, mark.kv_heads, len(rules_of(settings)))))
    # which heads are forced isn't known yet, how many is
    spread = np.arange(layers * mark.kv_heads).reshape(mark.kv_heads, layers).T
    allowed = _forced(problem, spread < _forced_count(settings, problem))
    solve(replace(problem, allowed=allowed, whole=False), np.ones(1))


def rules_of(settings: Heads) -> tuple[Rule, ...]:
    """The rules of a recipe's section: full attention, a streaming head's, those of the grid, and with strides."""
    stream = rule_of(settings)
    grid = rule_set(settings.lengths, settings.sink, _constrained(settings))
    windows = _different((Rule(settings.sink, Window()), stream, *grid), _constrained(settings))
    return (*windows, *(replace(stream, stride=Stride(every)) for every in settings.strides))


def rule_set(profiled: Sequence[int], sink: int, told: Sequence[int]) -> tuple[Rule, ...]:
    """Windows ``a + b N`` of the paper's grid (section 4.1), at least a block long.

    Args:
        profiled: lengths in tokens; ``a`` is between the shortest below 0 and the longest.
        sink: first tokens of all of them.
        told: lengths at which rules have to differ: those that keep as many tokens at all of these are one.
    """
    alphas = [round(a / BLOCK) * BLOCK for a in np.linspace(-min(profiled), max(profiled), ALPHAS)]
    pairs = [(a, float(b)) for b in np.linspace(0, 1, BETAS) for a in alphas if a + b * min(profiled) > 0]
    return _different([Rule(sink, Window(a, b, min=BLOCK)) for a, b in pairs], told)


def _different(rules: Sequence[Rule], lengths: Sequence[int]) -> tuple[Rule, ...]:
    """The first of those that keep equally many tokens."""
    found: dict[tuple[int, ...], Rule] = {}
    for rule in rules:
        found.setdefault(tuple(kept(rule, length) for length in lengths), rule)
    return tuple(found.values())


def kept(rule: Rule, length: int) -> int:
    """Tokens of so many that a head with a rule keeps."""
    span = rule.window.span(length)
    near = min(rule.sink + span, length)
    if rule.stride is None:
        return near
    blocks = np.arange(rule.sink, max(rule.sink, length - span)) // BLOCK
    return near + int(((blocks - rule.stride.phase) % rule.stride.every == 0).sum())


def _constrained(settings: Heads) -> tuple[int, ...]:
    """The lengths at which the budget has to hold."""
    return tuple(sorted({*settings.lengths, settings.budget_tokens}))


def _full(config: PreTrainedConfig) -> tuple[int, ...]:
    """The layers whose heads get rules."""
    mark = fingerprint_of(config)
    return tuple(sorted(set(range(mark.layers)) - set(mark.sliding)))


def _problem(settings: Heads, config: PreTrainedConfig, costs: Floats) -> Problem:
    """The programme; densities are bytes of the whole cache, layers with sliding windows among them."""
    mark, layers = fingerprint_of(config), _full(config)
    token = 4 * mark.head_dim * mark.kv_heads * len(layers)  # keys and values of 16 bits
    rules, lengths = rules_of(settings), _constrained(settings)
    dropped = [[[n - kept(placed(rule, layer), n) for rule in rules] for layer in layers] for n in lengths]
    table = 1 - token * np.array(dropped) / np.array([[[dense_bytes(config, length)]] for length in lengths])
    return Problem(costs, table, settings.retention, rules=settings.rules)


def _allowed(profiler: Profiler, problem: Problem, layers: list[int]) -> Any:
    """The heads with the highest induction score have to keep everything, as many as the recipe says."""
    shape = problem.costs.shape[1:3]
    first = np.zeros(shape, bool)
    if count := _forced_count(profiler.subject.settings, problem):
        order = profiler.score("induction")[layers].flatten().argsort(descending=True, stable=True)
        first.reshape(-1)[order[:count].numpy()] = True
    return _forced(problem, first)


def _forced_count(settings: Heads, problem: Problem) -> int:
    """How many heads have to keep everything."""
    return round(settings.forced * problem.costs.shape[1] * problem.costs.shape[2])


def _forced(problem: Problem, first: "np.ndarray") -> Any:
    """The rules that heads may have, where the first, ``[layers, KV heads]`` bool, have to keep everything."""
    allowed = np.ones(problem.costs.shape[1:], bool)
    allowed[first, FULL + 1 :] = False
    return allowed


def _costs(profiler: Profiler, facts: ModelFacts, rules: Sequence[Rule]) -> Tensor:
    """Of every rule, ``[lengths, layers, KV heads, rules]``, mean over the prompts of a length."""
    settings, begun = profiler.subject.settings, time.perf_counter()
    lengths = sorted(settings.lengths)

    def place(item: Item) -> int:  # a prompt may be a little shorter than asked for
        return next(n for n, length in enumerate(lengths) if len(item.ids) <= length)

    def measure(item: Item) -> Tensor:
        found = torch.zeros(len(lengths), facts.num_layers, facts.config.num_key_value_heads, len(rules))
        found[place(item)] = influence(profiler.subject.model, [item], rules, settings.elementwise)
        return found

    mean = profiler.each("moa", measure)
    counts = torch.zeros(len(lengths))
    for item in profiler.items():
        counts[place(item)] += 1
    found = mean * (len(profiler.items()) / counts.clamp_min(1))[:, None, None, None]
    name = "elementwise" if settings.elementwise else "influence"
    profiler.record(name, found[..., STREAM].mean(0), time.perf_counter() - begun)
    return found


@dataclass
class Comparison:
    """Losses of answers in prompts longer than those that were profiled, each kept as soon as it is there.

    Attributes:
        profiler: of the model.
        rules: that choices number.
        layers: that have rules.
    """

    profiler: Profiler
    rules: Sequence[Rule]
    layers: Sequence[int]

    @property
    def length(self) -> int:
        """Tokens of the prompts."""
        longest = context_of(self.profiler.job.view.config)
        wanted = int(BEYOND * max(self.profiler.subject.settings.lengths))
        return wanted if longest is None else min(wanted, longest)

    def loss(self, choice: Choice | None) -> float:
        """Mean over the prompts, in nats a token; None is full attention."""
        name = "full attention" if choice is None else choice.name
        # a programme that ran out of time may end elsewhere in the next attempt
        key = name if choice is None else f"{name} {crc32(repr(choice.rules).encode()):08x}"
        found: dict[str, float] = self.profiler.state.setdefault("moa_losses", {})
        if key not in found:
            layers = Layers(self.profiler.subject.model)
            with evaluating(self.profiler.subject.model), layers.tapped():
                each = [answer_loss(layers, item, self.tap(choice, len(item.ids))) for item in self._items]
            found[key] = sum(each) / len(each)
            self.profiler.job.folder.save()
            told = f"heads: plan of {name}: loss {found[key]:.4f} at {self.length:,} tokens"
            self.profiler.job.emit(Message(told))
        return found[key]

    @cached_property
    def _items(self) -> list[Item]:
        """Other prompts than those of the profile."""
        subject = self.profiler.subject
        changed = {"lengths": (self.length,), "items": COMPARED, "seed": subject.settings.seed + 1}
        return prompts(Subject(lambda: subject.model, subject.tokenizer, subject.settings.model_copy(update=changed)))

    def tap(self, choice: Choice | None, length: int) -> Tap | None:
        """Attention under a choice, as the runtime has it."""
        if choice is None:
            return None
        chosen = dict(zip(self.layers, choice.rules, strict=True))

        def narrow(seen: Seen) -> Tensor:
            heads: dict[int, list[int]] = {}
            for head, rule in enumerate(chosen[seen.layer]):
                heads.setdefault(rule, []).append(head)
            clusters = [Cluster(tuple(own), self._part(rule, seen.layer, length)) for rule, own in heads.items()]
            layer = PlanLayer(seen.layer, clusters)
            held, _ = layer.update(seen.key, seen.value)
            if not isinstance(held, Handle):
                return seen.attend()  # nothing is dropped
            return layer.attend(seen.query, None, seen.scaling).transpose(1, 2)

        return narrow

    def _part(self, number: int, layer: int, length: int) -> PlainPart:
        rule = placed(self.rules[number], layer)
        return PlainPart(Reach(rule.sink, rule.window, rule.stride, length))
