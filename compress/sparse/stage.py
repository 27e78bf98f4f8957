"""The stage ``sparse``: which heads search for the tokens that they attend, and how, written into the attention plan.

Nothing has to be learnt for it. The run measures on a text what the lists see of the true attention, layer by layer,
and what they cost, so that the report says whether the search finds what the model looks at.
"""

import time
from collections.abc import Iterator
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
from compress.memory import release
from compress.model import ModelFacts
from compress.plan import AttentionPlan, Search, Source, TopK
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
        job.plan = sparse_plan(facts, settings, job.plan)
        tokens = _measured(facts, settings)
        layers = list(_measurements(job, settings, tokens)) if tokens else []
        job.report["sparse"] = report = _report(job.plan, settings, tokens, layers)
        job.emit(Message(report["summary"]))
        job.emit(StageDone("sparse", time.perf_counter() - started))


def searching_layers(facts: ModelFacts, settings: Sparse) -> list[int]:
    """Layers whose heads search."""
    return [layer for layer in _full(facts) if layer >= settings.dense_layers]


def seen_tokens(settings: Sparse) -> int:
    """Tokens that a head attends of a long text."""
    return settings.sink + settings.window + settings.k


def sparse_plan(facts: ModelFacts, settings: Sparse, plan: AttentionPlan | None = None) -> AttentionPlan:
    """The plan with what the section says; heads that drop tokens are left as they are."""
    writer = PlanWriter(plan or AttentionPlan.empty(facts.config), Source(settings.method, settings.model_dump()))
    writer.search(search_of(settings))
    held = (plan or AttentionPlan.empty(facts.config)).layers
    for layer in searching_layers(facts, settings):
        for head, rule in enumerate(held[layer].heads):
            if rule.kind == "full":
                writer.topk(layer, head, TopK(settings.k, settings.method))
    return writer.finish()


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
    """Layers without a sliding window of the model's own."""
    sliding = set(AttentionPlan.empty(facts.config).fingerprint.sliding)
    return [layer for layer in range(facts.num_layers) if layer not in sliding]


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
    searching, found = set(searching_layers(job.view.facts, settings)), []

    def tap(seen: Seen) -> Tensor:
        start = time.process_time()
        out = seen.attend()
        dense = time.process_time() - start
        if seen.layer in searching:
            found.append(_layer(seen, policy, seen_tokens(settings)) | {"dense_seconds": dense})
        return out

    model.base_model(input_ids=ids[None].to(job.device), tap=tap, use_cache=False)
    del model
    release()
    yield from found


def _layer(seen: Seen, policy: Finder, first: int) -> dict[str, float]:
    """Of rows from ``first`` on, before which all is attended: the mean share of attention that they see, the share
    that sinks and window alone have, and the processor's seconds."""
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


def _report(plan: AttentionPlan, settings: Sparse, tokens: int, layers: list[dict[str, float]]) -> dict[str, Any]:
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
        "attended_tokens": seen_tokens(settings),
        "measured_tokens": tokens,
        "recall": mean,
        "layers": layers,
    }
