"""The stage ``kv``: what the cache keeps of every token, written into the attention plan.

ZipCache needs no calibration: which tokens are salient is found in every prompt. Only where a budget is set do
calibration windows decide on the bits of each layer (``budget.py``).
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from compress.artifact.kept import kept_bytes
from compress.artifact.packed_checkpoint import stored_view
from compress.calibrate.errors import InputError
from compress.calibrate.stream import ActivationFile
from compress.events import LayerDone, LayerStarted, Message, StageDone, StageStarted
from compress.job import Estimate, Job
from compress.kv.budget import CANDIDATES, WINDOWS, Choice, Profile, choose, prompt_tokens
from compress.kv.copying import Place, anywhere, copying_heads, how_many
from compress.kv.settings import bits_of, copying_bits, packing_of
from compress.model import ModelFacts
from compress.plan import AttentionPlan, KVBits, Source
from compress.plan_compile import layer_bytes, predict_bytes
from compress.plan_writer import PlanWriter
from compress.recipe import Recipe
from compress.schema import KV

LENGTHS = (2048, 4096, 8192)  # of which sizes are told


class KVStage:
    """Quantization of the KV cache, as the section ``kv`` of the recipe describes it."""

    name = "kv"

    def preflight(self, facts: ModelFacts, recipe: Recipe) -> None:
        """See :class:`compress.job.Stage`."""
        settings = _present(recipe)
        if not packed_layers(facts):
            raise InputError(
                "--model",
                facts.source,
                "every layer of it has a sliding window: its cache doesn't grow with the text, and isn't packed",
                fix="leave the section kv out",
            )
        if facts.head_dim % 8:
            raise InputError(
                "--model", facts.source, f"its heads of {facts.head_dim} can't be packed", allowed="multiples of 8"
            )
        if settings.budget is not None:
            _check_budget(facts, recipe, settings)

    def estimate(self, facts: ModelFacts, recipe: Recipe) -> Estimate:
        """See :class:`compress.job.Stage`."""
        settings = _present(recipe)
        plan = _plan(facts, recipe, bits_of(settings, packed_layers(facts)))
        chosen = settings.budget is not None
        calibration = recipe.calibration
        windows = min(WINDOWS, calibration.samples) if chosen and calibration is not None else 0
        tokens = windows * calibration.seq_len if calibration is not None else 0
        lines = _lines(facts, settings, plan)
        if recipe.heads is not None:
            lines.append("KV cache: that is with every head keeping all tokens; what streaming heads save comes on top")
        layer = sum(fact.out_features * fact.in_features for fact in facts.linears(0).values())
        scratch = 4 * tokens * facts.config.hidden_size
        return Estimate(
            lines=lines,
            flops=2.0 * tokens * layer * facts.num_layers,
            scratch_bytes=scratch,
            memory_bytes=scratch + 12 * layer,
            artifact_bytes=kept_bytes(facts, recipe),
            facts={"bytes": {} if chosen else {str(n): _sizes(facts, plan, n) for n in LENGTHS}},
        )

    def run(self, job: Job) -> None:
        """See :class:`compress.job.Stage`."""
        settings = _present(job.recipe)
        facts = job.view.facts
        started = time.perf_counter()
        job.emit(StageStarted("kv", facts.num_layers))
        copying = _copying(job, settings)
        choice = None if settings.budget is None else _chosen(job, settings, copying)
        layers = packed_layers(facts)
        bits = bits_of(settings, layers) if choice is None else dict(zip(layers, choice.bits, strict=True))
        digest = None if choice is None or job.calibration is None else job.calibration.digest
        job.plan = _plan(facts, job.recipe, bits, job.plan, digest, copying)
        job.report["kv"] = report = _report(facts, settings, job.plan, bits, choice)
        report["copying_heads"] = [list(place) for place in copying]
        job.emit(Message(report["summary"]))
        job.emit(StageDone("kv", time.perf_counter() - started))


def packed_layers(facts: ModelFacts) -> list[int]:
    """The layers that attend to everything; those with a sliding window and those that share stay in 16 bits."""
    return [layer for layer in _growing(facts) if layer not in facts.sharing]


def _growing(facts: ModelFacts) -> list[int]:
    return [layer for layer in range(facts.num_layers) if facts.window(layer) is None]


def _check_budget(facts: ModelFacts, recipe: Recipe, settings: KV) -> None:
    calibration = recipe.calibration
    assert calibration is not None
    assert settings.budget is not None
    least = settings.first_flush + settings.flush
    if prompt_tokens(calibration.seq_len) < least:
        raise InputError(
            "calibration.seq_len",
            calibration.seq_len,
            "is too short to choose bits by: before so many tokens next to nothing is packed",
            allowed=f"from {next(n for n in range(least, 2 * least + 8) if prompt_tokens(n) >= least)}",
        )
    dense = _dense_bytes(facts, settings.budget_tokens)
    smallest = _plan(facts, recipe, dict.fromkeys(packed_layers(facts), CANDIDATES[0]))
    most = dense / predict_bytes(smallest, facts.config, settings.budget_tokens).allocated
    if settings.budget > most and recipe.heads is None:  # streaming heads save more, how much is known later
        raise InputError(
            "kv.budget",
            settings.budget,
            f"with 2 bits in every layer the cache is {most:.2f} times smaller at {settings.budget_tokens} tokens",
            allowed=f"up to {most - 0.005:.2f}",
            fix="lower kv.budget, or raise kv.budget_tokens",
        )


def _chosen(job: Job, settings: KV, copying: Sequence[Place]) -> Choice:
    """The bits of every packed layer by their errors on the calibration text; what is known already is kept."""
    state = job.folder.stage("kv")
    if "errors" not in state:
        state["errors"] = _errors(job, settings)
        job.folder.save()
    facts = job.view.facts
    assert settings.budget is not None
    sizes, apart = _candidate_bytes(facts, job.recipe, copying, job.plan)
    dense = _dense_bytes(facts, settings.budget_tokens)
    limit = int(dense / settings.budget) - apart
    if (least := sum(map(min, sizes))) > limit:  # known only now that heads are chosen, which may have taken hours
        told = f"kv.budget={settings.budget:g} can't be met beside what some heads keep at 16 bits"
        nearest = f"{dense / (least + apart):.2f} times smaller at {settings.budget_tokens:,} tokens"
        job.emit(Message(f"{told}: the nearest is taken, {nearest}", "warning"))
    return choose(state["errors"], sizes, max(limit, least))


def _errors(job: Job, settings: KV) -> list[list[float]]:
    """Of each packed layer and each way of packing it."""
    assert job.calibration is not None
    view = job.view if job.result is None else stored_view(job.view, job.result)
    ids = job.calibration.ids[:WINDOWS]
    path = job.folder.path / "kv-hidden.bin"
    path.unlink(missing_ok=True)  # of an attempt that was killed
    hidden = ActivationFile(path, (*ids.shape, view.config.hidden_size))
    embed = view.embed_weight()
    for window, tokens in enumerate(ids):
        hidden[window] = embed[tokens]
    del embed
    profile = Profile(view, packing_of(settings, job.report["seed"]), job.device, hidden)
    packed, errors = packed_layers(view.facts), []
    for index in range(view.num_layers):
        job.emit(LayerStarted(index, view.num_layers))
        started = time.perf_counter()
        found = profile.layer(index, CANDIDATES if index in packed else (), _keeping(view.facts, job.plan, index))
        errors += [found] if found else []
        job.emit(LayerDone(index, view.num_layers, time.perf_counter() - started))
    path.unlink()
    return errors


def _plan(
    facts: ModelFacts,
    recipe: Recipe,
    bits: Mapping[int, KVBits],
    start: AttentionPlan | None = None,
    digest: str | None = None,
    copying: Sequence[Place] | None = None,
) -> AttentionPlan:
    """The plan with these bits, and what others wrote into ``start``; ``digest`` is of the text behind them."""
    settings, seed = _present(recipe), _seed(recipe)
    source = Source(
        settings.method, settings.model_dump(mode="json"), digest, seed=seed, tool_version=version("compress")
    )
    writer = PlanWriter(start or AttentionPlan.empty(facts.config), source)
    writer.packing(packing_of(settings, seed))
    for layer, found in bits.items():
        writer.kv(layer, found)
    if copying is None:
        copying = anywhere(_copying_count(facts, settings), facts.config.num_key_value_heads, packed_layers(facts))
    for layer, head in copying:
        writer.kv(layer, copying_bits(settings), (head,))
    return writer.finish()


def _keeping(facts: ModelFacts, plan: AttentionPlan | None, layer: int) -> tuple[int, ...]:
    """The KV heads of a layer that drop no tokens, and are packed."""
    held = (plan or AttentionPlan.empty(facts.config)).layers[layer].heads
    return tuple(number for number, head in enumerate(held) if head.window.full and head.stride is None)


def _copying_count(facts: ModelFacts, settings: KV) -> int:
    """How many KV heads' tokens are all salient, where all are packed."""
    return how_many(settings.copying_heads, facts.config.num_key_value_heads * len(packed_layers(facts)))


def _copying(job: Job, settings: KV) -> list[Place]:
    """These heads; what is known already is kept."""
    facts = job.view.facts
    keeping = [(layer, head) for layer in packed_layers(facts) for head in _keeping(facts, job.plan, layer)]
    return copying_heads(job, "kv", keeping, settings.copying_heads)


def _seed(recipe: Recipe) -> int:
    return recipe.calibration.seed if recipe.calibration is not None else 0


def _present(recipe: Recipe) -> KV:
    assert recipe.kv is not None  # the pipeline runs a stage only if its section is there
    return recipe.kv


def _sizes(facts: ModelFacts, plan: AttentionPlan, length: int) -> dict[str, int]:
    """Bytes of one sequence's cache: at 16 bits, and as the plan has it."""
    found = predict_bytes(plan, facts.config, length)
    return {"dense": _dense_bytes(facts, length), **asdict(found)}


def _dense_bytes(facts: ModelFacts, length: int) -> int:
    """Of a 16-bit cache of one sequence, in which sliding layers hold no more than their window."""
    each = 4 * facts.config.num_key_value_heads * facts.head_dim
    return each * length * len(_growing(facts)) + _apart(facts, length)


def _candidate_bytes(
    facts: ModelFacts, recipe: Recipe, copying: Sequence[Place], start: AttentionPlan | None
) -> tuple[list[list[int]], int]:
    """Bytes of each packed layer in each of the ways that may be chosen, and of all that no choice changes."""
    layers, length = packed_layers(facts), _present(recipe).budget_tokens
    columns, apart = [], 0
    for bits in CANDIDATES:
        plan = _plan(facts, recipe, dict.fromkeys(layers, bits), start, copying=copying)
        found = layer_bytes(plan, facts.config, length)
        columns.append([found[layer].allocated for layer in layers])
        apart = predict_bytes(plan, facts.config, length).allocated - sum(columns[-1])
    return [list(row) for row in zip(*columns, strict=True)], apart


def _apart(facts: ModelFacts, length: int) -> int:
    """Bytes of the layers that aren't packed."""
    each = 4 * facts.config.num_key_value_heads * facts.head_dim
    windows = [window for layer in range(facts.num_layers) if (window := facts.window(layer)) is not None]
    return sum(each * min(window, length) for window in windows)


def _lines(facts: ModelFacts, settings: KV, plan: AttentionPlan) -> list[str]:
    slides = [layer for layer in range(facts.num_layers) if facts.window(layer) is not None]
    lines = []
    if slides:
        named = ", ".join(map(str, slides[:8])) + (", ..." if len(slides) > 8 else "")
        lines.append(f"KV cache: layers {named} stay in 16 bits: they are sliding and hold no more than their window")
    if settings.budget is not None:
        told = f"{settings.budget:g} times smaller than at 16 bits at {settings.budget_tokens:,} tokens"
        return [*lines, f"KV cache: bits of each layer chosen on the calibration text, so that it is {told}"]
    sizes = {length: _sizes(facts, plan, length) for length in LENGTHS}
    told = ", ".join(
        f"{found['allocated'] / 1e6:.1f} MB at {length:,} tokens ({found['dense'] / found['allocated']:.2f}x smaller)"
        for length, found in sizes.items()
    )
    return [*lines, f"KV cache: {settings.method}, {told} than at 16 bits"]


def _report(
    facts: ModelFacts, settings: KV, plan: AttentionPlan, bits: Mapping[int, KVBits], choice: Choice | None
) -> dict[str, Any]:
    """The report's section ``kv``."""
    lengths = sorted({*LENGTHS, settings.budget_tokens} if choice is not None else LENGTHS)
    sizes = {str(length): _sizes(facts, plan, length) for length in lengths}
    errors = [None] * len(bits) if choice is None else list(choice.errors)
    return {
        "method": settings.method,
        "summary": _summary(settings.method, sizes),
        "bytes": sizes,
        "layers": [
            {
                "layer": layer,
                "high_bits": list(found.high),
                "low_bits": list(found.low),
                "ratio": found.ratio,
                "error": error,
            }
            for (layer, found), error in zip(sorted(bits.items()), errors, strict=True)
        ],
        "unpacked": [layer for layer in range(facts.num_layers) if layer not in bits],
    }


def recounted(section: dict[str, Any], facts: ModelFacts, plan: AttentionPlan) -> dict[str, Any]:
    """A report's section ``kv`` with the bytes of a plan that has changed since."""
    sizes = {length: _sizes(facts, plan, int(length)) for length in section["bytes"]}
    return section | {"bytes": sizes, "summary": _summary(section["method"], sizes)}


def _summary(method: str, sizes: Mapping[str, Mapping[str, int]]) -> str:
    at = sizes["4096"]
    ratio, each = at["dense"] / at["allocated"], at["allocated"] / 4096
    return f"{method}, {each:.0f} bytes a token, {ratio:.2f} times smaller than at 16 bits at 4,096 tokens"
