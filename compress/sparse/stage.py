"""The stage ``sparse``: which heads search for the tokens that they attend, and how, written into the attention plan.

Only SEA's estimators have to be learnt for it (``sea_stage.py``). The run measures on a text what the lists see of the
true attention, layer by layer, and what they cost, so that the report says whether the search finds what the model
looks at.
"""

import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.artifact.kept import kept_bytes
from compress.artifact.packed_checkpoint import stored_view
from compress.calibrate.errors import InputError
from compress.calibrate.text import PYDOC, open_text
from compress.device import pick_dtype
from compress.evalsuite.sliding import context_of
from compress.events import Message, StageDone, StageStarted
from compress.heads.layers import Layers
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
from compress.sparse.packing import check_packed
from compress.sparse.recall import recall
from compress.sparse.sea_file import POLICY, Learned
from compress.sparse.sea_stage import check_fit, fit_estimators, fit_flops, learned_report, save_learned
from compress.tap import NAME, Seen

MAP_TOKENS = 1024  # of the text on which estimated attention is drawn

PUBLISHED = {
    "hip": "HiP, staged search (arXiv 2502.08910)",
    "quest": "Quest (arXiv 2406.10774)",
    "block_mean": "block means",
    "sea": "SEA (arXiv 2310.01777)",
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
        if settings.method == POLICY:
            assert recipe.calibration is not None  # the recipe has seen to it
            check_fit(facts, settings, recipe.calibration)
        if recipe.kv is not None:
            check_packed(settings.method, settings.sink, settings.window, recipe.kv)
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
            flops=4.0 * tokens * facts.num_params + self._fit_flops(recipe, len(layers)),
            scratch_bytes=0,
            memory_bytes=4 * facts.num_params if tokens or settings.method == POLICY else 0,
            artifact_bytes=kept_bytes(facts, recipe),
            facts={"layers": layers},
        )

    def _fit_flops(self, recipe: Recipe, layers: int) -> float:
        settings = _present(recipe)
        if settings.method != POLICY or recipe.calibration is None:
            return 0.0
        return fit_flops(settings, recipe.calibration, layers)

    def run(self, job: Job) -> None:
        """See :class:`compress.job.Stage`."""
        settings, facts = _present(job.recipe), job.view.facts
        started = time.perf_counter()
        job.emit(StageStarted("sparse", len(searching_layers(facts, settings)) if settings.method == POLICY else 0))
        copying = copying_heads(job, self.name, _places(facts, settings, job.plan), settings.copying_heads)
        job.plan = sparse_plan(facts, settings, job.plan, copying)
        tokens = _measured(facts, settings)
        model = _model(job) if tokens or settings.method == POLICY else None
        if model is not None and settings.method == POLICY:
            job.plan = replace(job.plan, estimators=_learned(job, settings, job.plan, model))
        layers = [] if model is None or not tokens else list(_measurements(job, settings, model, tokens))
        del model
        release()
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
def _measurements(job: Job, settings: Sparse, model: PreTrainedModel, tokens: int) -> Iterator[dict[str, float]]:
    """Of one layer after the other, on a text of this length: see `_layer`."""
    model.set_attn_implementation(NAME)
    ids, topk, search = _text(job, tokens), TopK(settings.k, settings.method), search_of(settings)
    assert job.plan is not None  # the stage has written it
    learned: Learned | None = job.plan.estimators
    searching = [_searching(layer) for layer in job.plan.layers]
    found: list[dict[str, float]] = []

    def tap(seen: Seen) -> Tensor:
        start = time.process_time()
        out = seen.attend()
        dense = time.process_time() - start
        if heads := searching[seen.layer]:
            policy = finder(topk, search, 0, None if learned is None else learned.estimator(seen.layer))
            share = len(heads) / seen.key.shape[1]  # of dense attention, which is all heads'
            found.append(_layer(seen.of(heads), policy, seen_tokens(settings)) | {"dense_seconds": dense * share})
        return out

    model.base_model(input_ids=ids[None].to(job.device), tap=tap, use_cache=False)
    yield from found


def _model(job: Job) -> PreTrainedModel:
    """As the artifact will have it."""
    view = job.view if job.result is None else stored_view(job.view, job.result)
    return view.load_dense(pick_dtype(job.device)).to(job.device)


def _text(job: Job, tokens: int) -> Tensor:
    """Tokens of Python's documentation."""
    text, tokenizer = "\n\n".join(open_text(PYDOC).documents), job.view.tokenizer()
    return torch.tensor(tokenizer(text[: 16 * tokens], add_special_tokens=False)["input_ids"][:tokens])


def _learned(job: Job, settings: Sparse, plan: AttentionPlan, model: PreTrainedModel) -> Learned:
    """Estimators for the heads that search; their files go with the artifact."""
    chosen = {index: heads for index, layer in enumerate(plan.layers) if (heads := _searching(layer))}
    learned = fit_estimators(job, settings, search_of(settings), model, chosen)
    ids = _text(job, min(MAP_TOKENS, learned.header.shape.length)).to(job.device)
    job.files += save_learned(learned, Layers(model), ids, job.folder.path)
    return learned


def _searching(layer: Layer) -> list[int]:
    """A layer's KV heads that search."""
    return [number for number, head in enumerate(layer.heads) if head.topk is not None]


def _layer(seen: Seen, policy: Finder, first: int) -> dict[str, float]:
    """Of rows from ``first`` on, before which all is attended: the mean share of attention that they see, the share
    that sinks and window alone have, and the processor's seconds, for the KV heads that search."""
    start = time.process_time()
    blocks = policy.prompt(seen.query, seen.key, seen.value, seen.query.shape[2])
    assert blocks is not None  # all queries are known
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
    learned: Learned | None = plan.estimators
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
    } | ({} if learned is None else {"estimators": learned_report(learned)})
