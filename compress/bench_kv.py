"""``compress bench --kv``: what a conversation's keys and values occupy, kept in this way and in others.

Bytes are counted on caches filled with random numbers of the model's shape, without its weights, so that it takes
seconds and works for a model that this machine couldn't run.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from compress.artifact.export import read_report
from compress.bench_side import open_any_config
from compress.calibrate.errors import InputError
from compress.checkpoint import read_json
from compress.kv.filling import Shape, filled_bytes, match
from compress.kv.schemes import DENSE, Scheme, from_plan, from_recipe, schemes
from compress.plan import AttentionPlan
from compress.report_page import update_report
from compress.source import locate
from compress.sparse.sea_file import read_whole_plan

OWN = "own"
FIRST, MOST = 1024, 32768  # tokens; what is counted unless lengths are given, as far as the context goes


@dataclass(frozen=True)
class KVRow:
    """One scheme at one length.

    Attributes:
        scheme: its name.
        length: tokens of one sequence.
        payload: bytes of codes, and of tokens that aren't packed.
        stored: with parameters, channel vectors, labels.
        allocated: of all tensors, with spare room.
        ratio: 16-bit bytes / allocated bytes.
        equal_tokens: recent tokens in 16 bits by which it would occupy as much as the first scheme; None for those that
            occupy more, or can't keep any.
    """

    scheme: str
    length: int
    payload: int
    stored: int
    allocated: int
    ratio: float
    equal_tokens: int | None


def bench_kv(model: str, kv: str = OWN, lengths: Sequence[int] | None = None) -> dict[str, Any]:
    """Bytes of a KV cache by length, beside other ways to keep it.

    Args:
        model: an artifact, a Hub id, a folder or a ``.gguf`` file; only its config is read.
        kv: ``own`` is the artifact's attention plan; else a recipe with a section ``kv``, an
            ``attention_plan.json``, or another artifact's folder.
        lengths: tokens; None is 1,024, doubled up to the context.

    Returns:
        As JSON types: ``model``, ``scheme``, ``heads``, ``width``, ``layers``, ``rows`` (:class:`KVRow`), ``missing``
        (names and why), ``about`` (names and what they are).

    Raises:
        InputError: no such model, recipe or plan; heads that can't be packed; an artifact without a plan; a plan for
            another model; a length beyond the context.
    """
    try:
        config, name = open_any_config(model)
    except InputError as error:
        raise error.under("ARTIFACT") from error
    context = getattr(config, "max_position_embeddings", None)
    chosen = _lengths(lengths, context)
    shape = Shape.of(config)
    if shape.width % 8:
        raise InputError("ARTIFACT", model, f"its heads of {shape.width} can't be packed", allowed="multiples of 8")
    subject = _subject(model, kv, config)
    known = schemes(config)
    dense, others = known[DENSE], [known[name] for name in known if name not in (subject.name, DENSE)]
    rows: list[KVRow] = []
    for length in chosen:
        full = filled_bytes(_made(dense), shape, [length]).allocated
        wanted = filled_bytes(_made(subject), shape, [length])
        rows.append(KVRow(subject.name, length, **asdict(wanted), ratio=full / wanted.allocated, equal_tokens=None))
        rows += [
            _row(scheme, shape, length, full, wanted.allocated)
            for scheme in (dense, *others)
            if scheme.make is not None
        ]
    return {
        "model": name,
        "scheme": subject.name,
        "heads": shape.heads,
        "width": shape.width,
        "layers": config.get_text_config(decoder=True).num_hidden_layers,
        "rows": [asdict(row) for row in rows],
        "missing": {scheme.name: scheme.missing for scheme in others if scheme.make is None},
        "about": {scheme.name: scheme.about for scheme in (subject, dense, *others) if scheme.make is not None},
    }


def save_kv(artifact: str, section: dict[str, Any]) -> Path | None:
    """Put the section into an artifact's report, as ``kv_bytes``.

    Args:
        artifact: its folder.
        section: from :func:`bench_kv`, of the artifact's own cache.

    Returns:
        ``report.json``; None if this isn't an artifact.
    """
    folder = Path(artifact).expanduser()
    return None if read_report(folder) is None else update_report(folder, kv_bytes=section)


def kv_table(section: dict[str, Any]) -> list[str]:
    """For a terminal."""
    lines = [
        f"KV cache of one sequence of {section['model']}: {section['layers']} layers, {section['heads']} KV heads of"
        f" {section['width']}",
        "| tokens | cache | payload | stored | allocated | 16 bits / allocated | 16-bit tokens for equal bytes |",
        "|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in section["rows"]:
        sizes = " | ".join(f"{row[key] / 1e6:,.2f} MB" for key in ("payload", "stored", "allocated"))
        more = "" if row["equal_tokens"] is None else f"{row['equal_tokens']:,}"
        lines.append(f"| {row['length']:,} | {row['scheme']} | {sizes} | {row['ratio']:.2f}x | {more} |")
    return [*lines, *(f"{name}: {why}" for name, why in section["missing"].items())]


def _row(scheme: Scheme, shape: Shape, length: int, full: int, wanted: int) -> KVRow:
    found = filled_bytes(_made(scheme), shape, [length])
    more = None
    if scheme.grows and found.allocated < wanted:
        more = match(scheme, shape, [length], wanted).more
    return KVRow(scheme.name, length, **asdict(found), ratio=full / found.allocated, equal_tokens=more)


def _made(scheme: Scheme) -> Any:
    assert scheme.make is not None
    return scheme.make(0)


def _lengths(lengths: Sequence[int] | None, context: int | None) -> list[int]:
    most = MOST if context is None else context
    if lengths is None:
        doubled = [FIRST << step for step in range(MOST.bit_length())]
        return [length for length in doubled if length <= min(most, MOST)] or [most]
    if min(lengths) < 2:
        raise InputError("--lengths", min(lengths), "is no conversation", allowed="from 2")
    if context is not None and max(lengths) > context:
        problem = f"beyond the context of {context} tokens"
        raise InputError("--lengths", max(lengths), problem, allowed=f"2 to {context}")
    return sorted(set(lengths))


def _subject(model: str, kv: str, config: PreTrainedConfig) -> Scheme:
    if kv == OWN:
        folder = locate(model).path
        plan = None if folder is None or not folder.is_dir() else read_whole_plan(folder, config)
        if plan is None:
            fix = "name a recipe: --kv zipcache-plus"
            raise InputError("ARTIFACT", model, "has no attention plan: its cache has 16 bits", fix=fix)
        return _checked(OWN, config, plan)
    path = Path(kv).expanduser()
    if path.suffix == ".json":
        return _checked(path.name, config, AttentionPlan.from_json(read_json(path, kv), kv))
    if path.is_dir() and (plan := read_whole_plan(path, config)) is not None:
        return _checked(path.resolve().name, config, plan)
    try:
        return from_recipe(kv, config)
    except InputError as error:
        if error.option != "--recipe":
            raise
        raise error.under("--kv") from error


def _checked(name: str, config: PreTrainedConfig, plan: AttentionPlan) -> Scheme:
    plan.check(config.get_text_config(decoder=True))
    return from_plan(name, config, plan)
