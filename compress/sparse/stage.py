"""The stage ``sparse``: which heads search for the tokens that they attend, and how, written into the attention plan.

Nothing has to be learnt for it. The run measures on a text what the lists see of the true attention, layer by layer,
and what they cost, so that the report says whether the search finds what the model looks at.
"""

import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compress.artifact.kept import kept_bytes
from compress.artifact.packed_checkpoint import stored_view
from compress.calibrate.errors import InputError
from compress.calibrate.text import PYDOC, open_text
from compress.device import pick_dtype
from compress.evalsuite.sliding import context_of
from compress.events import Message, StageDone, StageStarted
from compress.job import Estimate, Job
from compress.kernels.block_attention import block_attention
from compress.kv.copying import Place, copying_heads
from compress.memory import release
from compress.model import ModelFacts
from compress.plan import AttentionPlan, Layer, Search, Source, TopK
from compress.plan_writer import PlanWriter
from compress.recipe import Recipe
from compress.schema import Sparse
from compress.sparse.finder import Finder, finder
from compress.sparse.recall import recall
from compress.tap import NAME, Seen

PUBLISHED = {
    "hip": "HiP, staged search (arXiv 2502.08910)",
    "quest": "Quest (arXiv 2406.10774)",
    "block_mean": "block means",
}


class SparseStage:
    """Heads that search, as the section ``sparse`` of the recipe describes them."""

    name = "sparse"

    def preflight(self, facts: ModelFacts, recipe: Recipe) -> None:
        """See :class:`compress.job.Stage`."""
        settings = _present(recipe)
        if not searching_layers(facts, settings):
            raise InputError(
                "sparse.dense_layers",
                settings.dense_layers,
                f"none of the model's {facts.num_layers} layers is left to search in",
                allowed=f"at most {max(_full(facts), default=0)}",
            )
        if recipe.kv is not None:
            raise InputError(
                "sparse",
                settings.method,
                "searches among keys of 16 bits, and the section kv packs them",
                fix="leave one of the two out",
            )
        if settings.block_q % settings.block_k or settings.block_q % settings.pool:
            problem = f"isn't a multiple of sparse.block_k={settings.block_k} and of sparse.pool={settings.pool}"
            nearest = -(-settings.block_q // settings.block_k) * settings.block_k
            raise InputError("sparse.block_q", settings.block_q, problem, fix=f"sparse.block_q={nearest}")
        context, least = context_of(facts.config), seen_tokens(settings)
        if context is not None and least >= context:
            raise InputError(
                "sparse.k",
                settings.k,
                f"with {settings.sink} sinks and a window of {settings.window}, {least:,} tokens are attended, and the "
                f"model reads {context:,} at most: nothing would be searched for",
                fix="lower sparse.k or sparse.window, or leave the section sparse out",
            )

    def estimate(self, facts: ModelFacts, recipe: Recipe) -> Estimate:
        """See :class:`compress.job.Stage`."""
        settings = _present(recipe)
        tokens = _measured(facts, settings)
        gate = "as measured by the machine that runs it" if settings.gate is None else f"{settings.gate:,} tokens"
        layers = searching_layers(facts, settings)
        lines = [
            f"sparse: {len(layers)} of {facts.num_layers} layers attend {settings.sink} first, {settings.window} newest"
            f" and {settings.k} tokens found by {settings.method}; dense up to {gate}"
        ]
        return Estimate(
            lines=lines,
            flops=4.0 * tokens * facts.num_params,
            scratch_bytes=0,
            memory_bytes=4 * facts.num_params if tokens else 0,
            artifact_bytes=kept_bytes(facts, recipe),
            facts={"layers": layers},
        )

    def run(self, job: Job) -> None:
        """See :class:`compress.job.Stage`."""
        settings, facts = _present(job.recipe), job.view.facts
        started = time.perf_counter()
        job.emit(StageStarted("sparse"))
        copying = copying_heads(job, self.name, _places(facts, settings, job.plan), settings.copying_heads)
        job.plan = sparse_plan(facts, settings, job.plan, copying)
        tokens = _measured(facts, settings)
        layers = list(_measurements(job, settings, tokens)) if tokens else []
        job.report["sparse"] = report = _report(job.plan, settings, copying, tokens, layers)
        job.emit(Message(report["summary"]))
        job.emit(StageDone("sparse", time.perf_counter() - started))


def searching_layers(facts: ModelFacts, settings: Sparse) -> list[int]:
    """Layers whose heads search."""
    return [layer for layer in _full(facts) if layer >= settings.dense_layers]


def seen_tokens(settings: Sparse) -> int:
    """Tokens that a head attends of a long text."""
    return settings.sink + settings.window + settings.k


def sparse_plan(
    facts: ModelFacts, settings: Sparse, plan: AttentionPlan | None = None, copying: Collection[Place] = ()
) -> AttentionPlan:
    """The plan with what the section says; heads that drop tokens are left as they are, and those that copy."""
    writer = PlanWriter(plan or AttentionPlan.empty(facts.config), Source(settings.method, settings.model_dump()))
    writer.search(search_of(settings))
    for layer, head in _places(facts, settings, plan):
        if (layer, head) not in copying:
            writer.topk(layer, head, TopK(settings.k, settings.method))
    return writer.finish()


def _places(facts: ModelFacts, settings: Sparse, plan: AttentionPlan | None) -> list[Place]:
    """The KV heads that could search: those that see everything."""
    held = (plan or AttentionPlan.empty(facts.config)).layers
    layers = searching_layers(facts, settings)
    return [(layer, head) for layer in layers for head, rule in enumerate(held[layer].heads) if rule.kind == "full"]


def search_of(settings: Sparse) -> Search:
    """The section as a plan has it."""
    first, second, last = settings.refresh
    return Search(
        sink=settings.sink,
        window=settings.window,
        block_q=settings.block_q,
        block_k=settings.block_k,
        pool=settings.pool,
        refresh=(first, second, last),
        gate=settings.gate,
    )


def _full(facts: ModelFacts) -> list[int]:
    """Layers without a sliding window of the model's own, that share with none."""
    others = set(AttentionPlan.empty(facts.config).fingerprint.sliding) | facts.sharing
    return [layer for layer in range(facts.num_layers) if layer not in others]


def _present(recipe: Recipe) -> Sparse:
    assert recipe.sparse is not None  # the pipeline runs a stage only if its section is there
    return recipe.sparse


def _measured(facts: ModelFacts, settings: Sparse) -> int:
    """Tokens of the text that is measured on; 0 where it would be too short for a search."""
    context = context_of(facts.config)
    tokens = settings.measure_tokens if context is None else min(settings.measure_tokens, context)
    return tokens if tokens > seen_tokens(settings) else 0


@torch.no_grad()
def _measurements(job: Job, settings: Sparse, tokens: int) -> Iterator[dict[str, float]]:
    """Of one layer after the other, on a text of this length: see `_layer`."""
    view = job.view if job.result is None else stored_view(job.view, job.result)
    model = view.load_dense(pick_dtype(job.device)).to(job.device)
    model.set_attn_implementation(NAME)
    text, tokenizer = "\n\n".join(open_text(PYDOC).documents), job.view.tokenizer()
    ids = torch.tensor(tokenizer(text[: 16 * tokens], add_special_tokens=False)["input_ids"][:tokens])
    policy = finder(TopK(settings.k, settings.method), search_of(settings), 0)
    assert job.plan is not None  # the stage has written it
    searching = [_searching(layer) for layer in job.plan.layers]
    found: list[dict[str, float]] = []

    def tap(seen: Seen) -> Tensor:
        start = time.process_time()
        out = seen.attend()
        dense = time.process_time() - start
        if heads := searching[seen.layer]:
            found.append(_layer(seen, policy, seen_tokens(settings), heads) | {"dense_seconds": dense})
        return out

    model.base_model(input_ids=ids[None].to(job.device), tap=tap, use_cache=False)
    del model
    release()
    yield from found


def _searching(layer: Layer) -> list[int]:
    """A layer's KV heads that search."""
    return [number for number, head in enumerate(layer.heads) if head.topk is not None]


def _layer(seen: Seen, policy: Finder, first: int, heads: list[int]) -> dict[str, float]:
    """Of rows from ``first`` on, before which all is attended: the mean share of attention that they see, the share
    that sinks and window alone have, and the processor's seconds, for the KV heads that search."""
    group = seen.query.shape[1] // seen.key.shape[1]
    queries = seen.query.unflatten(1, (-1, group))[:, heads].flatten(1, 2)
    seen = replace(seen, query=queries, key=seen.key[:, heads], value=seen.value[:, heads])
    start = time.process_time()
    blocks = policy.prompt(seen.query, seen.key)
    searched = time.process_time()
    block_attention(seen.query, seen.key, seen.value, blocks, seen.scaling)
    attended = time.process_time()
    nothing = type(blocks)(
        blocks.starts, torch.zeros_like(blocks.counts), blocks.block_q, blocks.block_k, blocks.sink, blocks.window
    )
    shares = [recall(seen.query, seen.key, own, seen.scaling)[..., first:].mean() for own in (blocks, nothing)]
    return {
        "layer": seen.layer,
        "recall": round(float(shares[0]), 4),
        "recall_of_sink_and_window": round(float(shares[1]), 4),
        "search_seconds": searched - start,
        "attention_seconds": attended - searched,
    }


def _report(
    plan: AttentionPlan, settings: Sparse, copying: Collection[Place], tokens: int, layers: list[dict[str, float]]
) -> dict[str, Any]:
    """The report's section ``sparse``."""
    heads = sum(head.topk is not None for layer in plan.layers for head in layer.heads)
    told = f"{PUBLISHED[settings.method]}: {heads} KV heads attend {seen_tokens(settings):,} tokens at most"
    mean: float | None = None
    if layers:
        mean = sum(own["recall"] for own in layers) / len(layers)
        told += f", which have {mean:.3f} of the attention at {tokens:,} tokens"
    return {
        "method": settings.method,
        "summary": told,
        "heads": heads,
        "copying_heads": [list(place) for place in copying],
        "attended_tokens": seen_tokens(settings),
        "measured_tokens": tokens,
        "recall": mean,
        "layers": layers,
    }
