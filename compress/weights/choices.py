"""What the stage ``weights`` decides before it starts: group size, storage types, sizes, and what can't work."""

import re
from typing import Any

import torch

from compress.calibrate.errors import InputError
from compress.calibrate.stream import ActivationFile
from compress.job import Estimate
from compress.kernels.packing import packed_words
from compress.model import ModelFacts
from compress.recipe import Recipe
from compress.schema import Weights
from compress.scheme import Scheme
from compress.weights.layer import SHARES_BYTES, STACKS, width_of
from compress.weights.rotation import describe, rotates_residual, unties

AUTO_SIZES = (128, 64, 32, 16)
FLOAT16_FORMATS = ("gptq", "gguf")  # whose scales are of that type
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def group_size(facts: ModelFacts, settings: Weights) -> int:
    """Columns a scale; ``auto`` is the largest usual size that divides every layer's inputs, else -1."""
    if settings.group_size != "auto":
        return settings.group_size
    return next((size for size in AUTO_SIZES if not _indivisible(facts, size)), -1)


def storage_dtype(facts: ModelFacts, recipe: Recipe) -> torch.dtype:
    """The type of scales and unquantized tensors."""
    if recipe.export.dtype != "auto":
        return DTYPES[recipe.export.dtype]
    return torch.float16 if set(recipe.export.formats) & set(FLOAT16_FORMATS) else facts.dtype


def head_bits(facts: ModelFacts, settings: Weights) -> int:
    """Width of the stored head; one that stays tied to the embedding stays as it is."""
    return 16 if facts.tied and not unties(facts, settings) else settings.lm_head_bits


def check(facts: ModelFacts, recipe: Recipe) -> None:
    """Everything about a model and a recipe that would fail later.

    Raises:
        InputError: group size, overrides, or window length don't fit the model.
    """
    settings = recipe.weights
    assert settings is not None
    size = group_size(facts, settings)
    if size != -1 and (bad := _indivisible(facts, size)):
        name, columns = bad[0]
        fitting = [candidate for candidate in range(8, 513, 8) if not _indivisible(facts, candidate)]
        nearest = min(fitting, key=lambda s: abs(s - size), default=-1)
        raise InputError(
            "weights.group_size",
            size,
            f"doesn't divide the {columns} inputs of {name}",
            allowed=", ".join(map(str, [*fitting, -1])),
            fix=f"the nearest is {nearest}",
        )
    names = [fact.name for layer in range(facts.num_layers) for fact in facts.linears(layer).values()]
    for pattern in settings.overrides:
        if not any(re.search(pattern, name) for name in names):
            raise InputError(
                "weights.overrides", pattern, "matches no linear layer", fix=f"they are named as {names[0]}"
            )
    _check_stacks(facts, settings)
    _check_asymmetric(facts, settings, names)
    context = getattr(facts.config, "max_position_embeddings", None)
    if recipe.calibration is not None and context and recipe.calibration.seq_len > context:
        raise InputError(
            "calibration.seq_len",
            recipe.calibration.seq_len,
            "is longer than the model's context",
            allowed=f"2 to {context}",
        )


def _check_asymmetric(facts: ModelFacts, settings: Weights, names: list[str]) -> None:
    """transformers 5.23 unpacks every zero point with the width of the first scheme, so there may be only one."""
    widths = {width_of(name, settings) for name in names}
    if not settings.symmetric and (len(widths) > 1 or head_bits(facts, settings) == 8):
        raise InputError(
            "weights.symmetric",
            False,
            "transformers reads zero points of one width only, and the recipe asks for several",
            fix="set weights.lm_head_bits=16 and no weights.overrides, or weights.symmetric=true",
        )


def _check_stacks(facts: ModelFacts, settings: Weights) -> None:
    """vLLM fuses q, k, v and gate, up into one matrix each, so they must be stored alike."""
    for layer in range(facts.num_layers):
        linears = facts.linears(layer)
        for stack in STACKS:
            widths = {linears[role].name: width_of(linears[role].name, settings) for role in stack}
            if len(set(widths.values())) > 1:
                told = ", ".join(f"{name} {bits}" for name, bits in widths.items())
                raise InputError(
                    "weights.overrides",
                    dict(settings.overrides),
                    f"gives layers that vLLM fuses different bits ({told})",
                    fix="use a pattern that matches q, k and v alike, and gate and up alike",
                )


def _indivisible(facts: ModelFacts, size: int) -> list[tuple[str, int]]:
    return [(fact.name, fact.in_features) for fact in facts.linears(0).values() if fact.in_features % size]


def stored_bytes(rows: int, columns: int, scheme: Scheme, dtype: torch.dtype) -> int:
    """Bytes of one quantized matrix in the artifact."""
    groups = 1 if scheme.group_size == -1 else columns // scheme.group_size
    zeros = 0 if scheme.symmetric else packed_words(rows, scheme.bits) * groups * 4
    return rows * packed_words(columns, scheme.bits) * 4 + rows * groups * dtype.itemsize + zeros + 16


def artifact_bytes(facts: ModelFacts, recipe: Recipe) -> int:
    """Bytes of all weights in the artifact, exact but for headers."""
    settings = recipe.weights
    assert settings is not None
    dtype, size = storage_dtype(facts, recipe), group_size(facts, settings)
    hidden, vocab = facts.config.hidden_size, facts.config.vocab_size
    total = (vocab * hidden + hidden) * dtype.itemsize
    for layer in range(facts.num_layers):
        linears = facts.linears(layer).values()
        for fact in linears:
            scheme = Scheme(width_of(fact.name, settings), size, settings.symmetric)
            total += stored_bytes(fact.out_features, fact.in_features, scheme, dtype)
        everything = sum(torch.Size(shape).numel() for shape in facts.layer_shapes.values())
        total += (everything - sum(fact.out_features * fact.in_features for fact in linears)) * dtype.itemsize
    if not facts.tied or unties(facts, settings):
        eight = head_bits(facts, settings) == 8
        total += stored_bytes(vocab, hidden, Scheme(8, size, True), dtype) if eight else vocab * hidden * dtype.itemsize
    return total


def estimate(facts: ModelFacts, recipe: Recipe) -> Estimate:
    """What the stage will do and need, from the config alone."""
    settings, calibration = recipe.weights, recipe.calibration
    assert settings is not None
    linears = facts.linears(0)
    samples = calibration.samples * calibration.expansion if calibration else 1
    length = calibration.seq_len if calibration else 64
    tokens = samples * length
    layer_weights = sum(fact.out_features * fact.in_features for fact in linears.values())
    widest = max(fact.in_features for fact in linears.values())
    hidden, vocab = facts.config.hidden_size, facts.config.vocab_size
    inputs = {linears[stack[0]].in_features for stack in STACKS}
    squares = sum(linears[stack[0]].in_features ** 2 for stack in STACKS)
    heads = facts.config.num_attention_heads * facts.head_dim
    attention = 2 * 2 * tokens * length / 2 * heads * (2 if settings.importance == "attention" else 1)
    measured = calibration is not None
    solving = sum(2 * f.out_features * f.in_features**2 for f in linears.values()) * (3 + 2 * settings.sweeps)
    flops = 2 * tokens * layer_weights + attention + measured * (1.3 * tokens * squares + solving)
    flops *= facts.num_layers
    if settings.tune_epochs and calibration is not None:
        flops += _tuning_flops(facts, calibration.samples, length, settings.tune_epochs)
    width = 2 * hidden + linears["o"].in_features + widest  # inputs and outputs, attention, MLP
    scratch = ActivationFile.nbytes((samples, length, width))
    result = artifact_bytes(facts, recipe)
    residual, per_head = describe(facts, settings)
    size = group_size(facts, settings)
    shares = min(4 * widest**2 * (torch.get_num_threads() + 1), SHARES_BYTES)
    if settings.tune_epochs and calibration is not None:
        windows = calibration.samples + (facts.num_layers + 1) * settings.tune_batch
        scratch += ActivationFile.nbytes((windows, length, hidden)) + result  # its layers once more, tuned
    memory = shares + layer_weights * 12 + widest**2 * 24 + vocab * hidden * (8 + 4) + len(inputs) * length * widest * 4
    if settings.tune_epochs:  # two dense heads; a layer's codes, weights and gradients
        memory = max(memory, vocab * hidden * 8 + layer_weights * 4 * (2 + torch.get_num_threads()))
    return Estimate(
        lines=_lines(facts, recipe, size, residual, per_head),
        flops=flops,
        scratch_bytes=scratch + result,
        memory_bytes=memory + scratch,
        artifact_bytes=result,
        facts={
            "method": settings.method,
            "bits": settings.bits,
            "group_size": size,
            "rotation": {"residual": residual, "heads": per_head},
            "untied": unties(facts, settings),
            "lm_head_bits": head_bits(facts, settings),
            "dtype": str(storage_dtype(facts, recipe)).removeprefix("torch."),
            "modules": _modules(facts, settings),
        },
    )


def _tuning_flops(facts: ModelFacts, windows: int, length: int, epochs: int) -> float:
    """Of end-to-end tuning: the dense model once; each epoch forward, forward again and back, and two heads."""
    tokens, vocabulary = windows * length, facts.config.vocab_size * facts.config.hidden_size
    linears = sum(fact.out_features * fact.in_features for fact in facts.linears(0).values()) * facts.num_layers
    attention = 2 * length * facts.config.num_attention_heads * facts.head_dim * facts.num_layers / 2
    forward = 2.0 * tokens * (linears + attention)
    return forward + epochs * (4 * forward + 6 * tokens * vocabulary)


def _modules(facts: ModelFacts, settings: Weights) -> list[dict[str, Any]]:
    return [
        {"role": role, "shape": [fact.out_features, fact.in_features], "bits": width_of(fact.name, settings)}
        for role, fact in facts.linears(0).items()
    ]


def _lines(facts: ModelFacts, recipe: Recipe, size: int, residual: str, heads: str) -> list[str]:
    settings = recipe.weights
    assert settings is not None
    lines = [f"{settings.method}, {Scheme(settings.bits, size, settings.symmetric)}, clip {settings.clip}"]
    if settings.method == "gptq":
        order = "static act-order" if settings.act_order else "original column order"
        lines[0] += f", {order}, {settings.sweeps} coordinate-descent sweeps, damping {settings.damp}"
    if settings.group_size == "auto":
        lines.append(f"group_size auto -> {size}: the largest usual size that divides every layer's inputs")
    if settings.rotation != "none":
        lines.append(f"rotations, fused into the weights: residual stream {residual}; value heads {heads}")
    if facts.tied and settings.rotation != "none" and not rotates_residual(facts, settings):
        lines.append("the head stays tied (untie: no), so the residual stream isn't rotated")
    if unties(facts, settings):
        lines.append(
            "the head is stored apart from the embedding it was tied to, because the final norm is fused into it"
        )
    if settings.tune_epochs:
        lines.append(
            f"then scales and norms learn from the dense model's answers: {settings.tune_epochs} epochs, learning rate "
            f"{settings.tune_lr:g}, {settings.tune_batch} windows a step"
        )
    if settings.lm_head_bits == 8:
        told = "8 bits, rounded to nearest" if head_bits(facts, settings) == 8 else "not quantized: it stays tied"
        lines.append(f"output head: {told}")
    if settings.importance != "none":
        spread = f"{settings.importance_min:g} to {settings.importance_max:g}, power {settings.importance_power:g}"
        lines.append(f"token importance: {settings.importance}, {spread}")
    return lines
