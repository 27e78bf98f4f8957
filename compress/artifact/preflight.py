"""Whether the formats of ``export.formats`` can hold what the recipe asks for, from the config alone."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from compress.artifact.gguf import ARCHITECTURES, GROUP_SIZE, LLAMA3, ROPE_TYPES, context_length
from compress.calibrate.errors import InputError
from compress.model import LinearFacts, ModelFacts
from compress.recipe import Recipe
from compress.schema import Weights
from compress.weights.choices import FLOAT16_FORMATS, group_size, head_bits, storage_dtype
from compress.weights.layer import width_of


def check_export(facts: ModelFacts, recipe: Recipe) -> None:
    """Find the first thing that a format can't hold.

    Raises:
        InputError: format, reason and the nearest way on.
    """
    for name in recipe.export.formats:
        if name in _CHECKS:
            _CHECKS[name](facts, recipe)
    narrow = [name for name in recipe.export.formats if name in FLOAT16_FORMATS]
    if narrow and recipe.export.dtype not in ("auto", "float16"):
        told = f"the scales of {' and '.join(narrow)} are float16, and rounding them again would change weights"
        raise InputError("export.dtype", recipe.export.dtype, told, allowed="auto, float16")


def export_notes(facts: ModelFacts, recipe: Recipe) -> list[str]:
    """What the formats decide by themselves, one sentence each."""
    formats, notes = recipe.export.formats, []
    narrow = [name for name in formats if name in FLOAT16_FORMATS]
    if narrow and storage_dtype(facts, recipe) != facts.dtype:
        notes.append(f"export.dtype auto -> float16: the type of scales in {' and '.join(narrow)}")
    context = facts.config.max_position_embeddings
    if "gguf" in formats and context_length(facts) < context:
        told = f"{context_length(facts)} tokens of context instead of {context}"
        notes.append(f"gguf: {told}, since llama.cpp has no sliding window for this family")
    return notes


def _linears(facts: ModelFacts, settings: Weights) -> list[tuple[LinearFacts, int]]:
    """Every linear layer of the decoder with its width."""
    layers = range(facts.num_layers)
    return [(fact, width_of(fact.name, settings)) for layer in layers for fact in facts.linears(layer).values()]


def _check_gptq(facts: ModelFacts, recipe: Recipe) -> None:
    settings = recipe.weights
    if settings is None:
        raise _refusal("gptq", "it holds quantized weights, and the recipe has no section 'weights'")
    linears = _linears(facts, settings)
    _check_widths("gptq", linears, settings, "its readers take 4 and 8 bits")
    if len({bits for _, bits in linears}) > 1:
        raise _refusal("gptq", "transformers reads GPTQ modules of one width only", "remove weights.overrides")
    if head_bits(facts, settings) == 8:
        raise _refusal("gptq", "transformers reads no quantized output head from it", "set weights.lm_head_bits=16")
    if not settings.symmetric and recipe.export.gptq_version == 1:
        raise InputError(
            "export.gptq_version",
            1,
            "can't store a zero point 0, which an asymmetric grid has",
            fix="set export.gptq_version=2, or weights.symmetric=true",
        )
    for fact, bits in linears:
        for what, count in (("inputs", fact.in_features), ("outputs", fact.out_features)):
            if count * bits % 32:
                raise _refusal("gptq", f"the {count} {what} of {fact.name} don't fill whole 32-bit words")


def _check_gguf(facts: ModelFacts, recipe: Recipe) -> None:
    if facts.family.name not in ARCHITECTURES:
        raise _refusal("gguf", f"the family {facts.family.name} has no counterpart in llama.cpp that is known here")
    rope = facts.config.rope_parameters
    known = rope["rope_type"] in ROPE_TYPES and all(rope.get(key, value) == value for key, value in LLAMA3.items())
    if not known:
        told = ", ".join(f"{key} {value}" for key, value in rope.items())
        raise _refusal("gguf", f"the model's RoPE scaling ({told}) isn't known to be read back as it is")
    settings = recipe.weights
    if settings is None:
        return
    _check_widths("gguf", _linears(facts, settings), settings, "its types Q4_0 and Q8_0 hold 4 and 8 bits")
    if (size := group_size(facts, settings)) != GROUP_SIZE:
        told = f"a block of Q4_0 and Q8_0 has {GROUP_SIZE} weights and one scale, and group_size is {size}"
        raise _refusal("gguf", told, f"set weights.group_size={GROUP_SIZE}")
    if not settings.symmetric:
        raise _refusal("gguf", "Q4_0 and Q8_0 have no zero points", "set weights.symmetric=true")


def _check_widths(name: str, linears: list[tuple[LinearFacts, int]], settings: Weights, told: str) -> None:
    for fact, bits in linears:
        if bits not in (4, 8):
            key = "weights.bits=4" if bits == settings.bits else "weights.overrides to 4 or 8 bits"
            raise _refusal(name, f"{told}, and the recipe gives {fact.name} {bits}", f"set {key}")


def _refusal(name: str, reason: str, fix: str | None = None) -> InputError:
    leave = f"leave {name} out of export.formats"
    return InputError("export.formats", name, reason, fix=leave if fix is None else f"{fix}, or {leave}")


_CHECKS: Mapping[str, Callable[[ModelFacts, Recipe], None]] = MappingProxyType(
    {"gptq": _check_gptq, "gguf": _check_gguf}
)
