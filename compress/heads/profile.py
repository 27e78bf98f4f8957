"""What is known of a model's KV heads, ``head_profile.json``: raw scores, and everything that they depend on."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, replace
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.calibrate.errors import InputError, did_you_mean
from compress.fingerprint import Fingerprint, fingerprint_of
from compress.heads.data import digest
from compress.heads.scores import ScoreSettings, score

FILE = "head_profile.json"
VERSION = 1
TOP = 10
"""Heads that are listed by name."""


@checked(frozen=True, config=ConfigDict(extra="forbid", strict=False, allow_inf_nan=False))
class HeadProfile:
    """Scores of every KV head, more where far tokens matter more.

    Attributes:
        fingerprint: of the model.
        scores: by name, ``[layers][KV heads]``.
        items: sha256 of the prompts; scores of other prompts are another profile.
        lengths: tokens of the prompts.
        seed: of everything random.
        seconds: that each score took.
        settings: what else the scores depend on.
        version: of this file.
    """

    fingerprint: Fingerprint
    scores: dict[str, list[list[float]]] = field(default_factory=dict)
    items: str = ""
    lengths: tuple[int, ...] = ()
    seed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def __post_init__(self) -> None:
        shape = [self.fingerprint.kv_heads] * self.fingerprint.layers
        if not sum(shape):
            raise ValueError("the model has no KV heads")
        for name, values in self.scores.items():
            if [len(row) for row in values] != shape:
                raise ValueError(f"{name} isn't one figure for each of {len(shape)} x {shape[0]} heads")

    def with_score(self, name: str, values: Tensor, seconds: float, **settings: Any) -> "HeadProfile":
        """The profile with one more score, or another for one that it has.

        Args:
            name: of the score.
            values: ``[layers, KV heads]``.
            seconds: that it took.
            settings: of this score, kept under its name.
        """
        scores = self.scores | {name: values.double().tolist()}
        kept = self.settings | ({name: settings} if settings else {})
        return replace(self, scores=scores, seconds=self.seconds | {name: round(seconds, 2)}, settings=kept)

    def check(self, config: Any) -> None:
        """Compare with a model's config.

        Raises:
            InputError: the profile is of another model; both fingerprints are told.
        """
        other = fingerprint_of(config)
        if other != self.fingerprint:
            raise InputError(
                FILE,
                None,
                f"is of another model: {self.fingerprint}; this one: {other}",
                fix="make the profile again for this model",
            )

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        found: dict[str, Any] = TypeAdapter(HeadProfile).dump_python(self, mode="json")
        return {"version": found.pop("version"), **found}

    def save(self, folder: Path) -> Path:
        """Write ``head_profile.json``."""
        path = folder / FILE
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def from_json(cls, content: object, where: str = FILE) -> "HeadProfile":
        """The inverse of :meth:`to_json`.

        Raises:
            InputError: it isn't a profile, or one of another version.
        """
        known = [f.name for f in fields(cls)]
        if not isinstance(content, Mapping) or not {"version", "fingerprint", "scores"} <= content.keys():
            raise InputError(where, None, "isn't a profile of heads")
        if content["version"] != VERSION:
            problem = f"is a profile of heads of version {content['version']!r}"
            raise InputError(where, None, problem, allowed=f"version {VERSION}", fix="make it again")
        try:
            return TypeAdapter(cls).validate_python(dict(content))
        except ValidationError as error:
            first = error.errors()[0]
            key = str(first["loc"][-1]) if first["loc"] else ""
            fix = did_you_mean(key, known) if first["type"] == "unexpected_keyword_argument" else None
            place = ".".join(map(str, first["loc"])) or "scores"
            raise InputError(where, None, f"{place}: {first['msg'].lower()}", fix=fix) from error

    def pick(self, name: str | None = None) -> str:
        """The name of a score that the profile has; by default its first.

        Raises:
            InputError: it has no such score.
        """
        if name is None and self.scores:
            return next(iter(self.scores))
        if name not in self.scores:
            allowed = ", ".join(self.scores) or "none: the profile is empty"
            fix = did_you_mean(name or "", self.scores)
            raise InputError("--score", name, "the profile has no such score", allowed=allowed, fix=fix)
        return name

    def ranking(self, name: str) -> list[tuple[int, int, float]]:
        """Layer, KV head and score of all heads, the largest first; equal ones in the order of the model."""
        flat = [(layer, head, value) for layer, row in enumerate(self.scores[name]) for head, value in enumerate(row)]
        return sorted(flat, key=lambda entry: -entry[2])

    def lines(self, name: str | None = None) -> list[str]:
        """For a terminal: one score as a chart, a line a layer and a digit a head, in tenths of the largest."""
        name = self.pick(name)
        mark, values = self.fingerprint, self.scores[name]
        low, high = min(map(min, values)), max(map(max, values))
        wide = len(str(mark.layers - 1))
        rows = [
            f"  layer {layer:>{wide}}  {' '.join(_digit(value, low, high) for value in row)}"
            for layer, row in enumerate(values)
        ]
        top = ", ".join(f"{layer}.{head} {value:.3g}" for layer, head, value in self.ranking(name)[:TOP])
        return [
            f"model     {mark}",
            f"scores    {', '.join(_told(other, self.seconds.get(other)) for other in self.scores)}",
            f"prompts   {', '.join(map(str, self.lengths)) or 'none'} tokens, seed {self.seed}, {self.items[:12]}",
            f"{name}: a line a layer, a figure a KV head, . for {short(low, high)} up to 9 for {short(high, high)}",
            *rows,
            f"largest   {top} (layer.head score)",
            *self._agreement(name),
        ]

    def _agreement(self, name: str) -> list[str]:
        others = [other for other in self.scores if other != name]
        if not others:
            return []
        first = self.top(name)
        told = ", ".join(f"{other} {len(first & self.top(other))}" for other in others)
        return [f"agreement of {name}'s {len(first)} largest with those of other scores: {told}"]

    def top(self, name: str) -> set[tuple[int, int]]:
        """The tenth of the heads with the largest scores, at least one."""
        ranking = self.ranking(name)
        return {(layer, head) for layer, head, _ in ranking[: max(1, len(ranking) // 10)]}


def profile(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], settings: ScoreSettings
) -> HeadProfile:
    """Take scores of a model.

    Args:
        model: a causal language model; it is left as it was.
        tokenizer: its tokenizer.
        names: of the scores, out of ``compress.heads.scores.NAMES``.
        settings: on what they are taken.

    Raises:
        InputError: as :func:`compress.heads.scores.score`.
    """
    found = empty_profile(model.config, tokenizer, settings)
    for name in names:
        start = time.perf_counter()
        values = score(name, model, tokenizer, settings)
        found = found.with_score(name, values, time.perf_counter() - start)
    return found


def empty_profile(config: Any, tokenizer: PreTrainedTokenizerBase, settings: ScoreSettings) -> HeadProfile:
    """A profile without scores, which says what they are to be taken on."""
    kept = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in ("lengths", "seed")}
    return HeadProfile(
        fingerprint=fingerprint_of(config),
        items=digest(settings.items(tokenizer)),
        lengths=settings.lengths,
        seed=settings.seed,
        settings=kept | {"haystacks": None if settings.haystacks is None else len(settings.haystacks)},
    )


def read_profile(path: Path, option: str = "PROFILE") -> HeadProfile:
    """Read a profile, or the one in an artifact's folder.

    Raises:
        InputError: there is none, or it can't be read.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        problem = f"has no {FILE}: its heads weren't profiled" if path.is_dir() else "there is no such file"
        raise InputError(option, path, problem)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(option, path, "isn't JSON") from error
    return HeadProfile.from_json(content, str(file))


def short(value: float, high: float) -> str:
    """A score with three digits; next to the largest it may be nothing."""
    return f"{value:.3g}" if abs(value) > 1e-3 * abs(high) else "0"


def _digit(value: float, low: float, high: float) -> str:
    tenth = 0 if high <= low else min(9, int(10 * (value - low) / (high - low)))
    return str(tenth) if tenth else "."


def _told(name: str, seconds: float | None) -> str:
    return name if seconds is None else f"{name} ({seconds:.0f} s)"
