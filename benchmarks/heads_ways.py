"""What benchmarks of streaming heads share: plans under names, and what they cost in bytes and answers."""

import hashlib
import json
import time
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from compress.evalsuite.longcontext import LongContextSettings, long_context, results

from compress.fingerprint import fingerprint_of
from compress.heads.select import Head, dense_bytes, streaming_plan
from compress.plan import AttentionPlan, Window
from compress.plan_compile import predict_bytes
from compress.plan_writer import Rule
from compress.runtime.plan_cache import PlanCache
from compress.schema import Heads


@dataclass(frozen=True)
class Way:
    """A plan and what tables call it."""

    name: str
    plan: AttentionPlan

    @property
    def mark(self) -> str:
        """Of what it keeps, whoever wrote it."""
        told = {key: self.plan.to_json().get(key) for key in ("layers", "packing", "search")}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


class Kept:
    """What was measured, in a file from the first figure on.

    Args:
        path: of the file; None keeps nothing.
        settings: that all figures depend on.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self.content: dict[str, Any] = {"settings": settings, "figures": {}}
        if path is not None and path.exists():
            self.content = json.loads(path.read_text())
            if self.content["settings"] != settings:
                raise SystemExit(f"{path} is of other settings: {self.content['settings']}; these are {settings}")

    def of(self, name: str, measure: Callable[[], Any], told: str = "") -> Any:
        """A figure, in JSON types, measured if it isn't there, and told by its name or in other words."""
        figures = self.content["figures"]
        if name not in figures:
            started = time.perf_counter()
            figures[name] = measure()
            print(f"  {told or name}: {time.perf_counter() - started:.0f} s", flush=True)
            self.save()
        return figures[name]

    def save(self) -> None:
        """Write it, whole or not at all."""
        if self.path is not None:
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.content) + "\n")
            part.replace(self.path)


def streaming_options(parser: ArgumentParser) -> None:
    """What a streaming head sees; by default as in the recipe."""
    parser.add_argument("--sink", type=int, default=Heads().sink)
    parser.add_argument("--recent", type=int, default=Heads().recent)


def rule_from(sink: int, recent: int) -> Rule:
    """Of a streaming head."""
    return Rule(sink, Window(a=recent, b=0.0))


def full_layers(config: Any) -> tuple[int, ...]:
    """The layers that attend to everything."""
    mark = fingerprint_of(config)
    return tuple(layer for layer in range(mark.layers) if layer not in mark.sliding)


def all_heads(config: Any) -> list[Head]:
    """KV heads of these layers."""
    return [(layer, head) for layer in full_layers(config) for head in range(fingerprint_of(config).kv_heads)]


def keeping(name: str, config: Any, rule: Rule, keep: Sequence[Head]) -> Way:
    """These heads keep every token, the others what the rule says."""
    return Way(name, streaming_plan(config, rule, tuple(keep)))


def stored_share(plan: AttentionPlan, config: Any, length: int) -> float:
    """Stored bytes of the cache at a length, as a share of those at full attention."""
    return predict_bytes(plan, config, length).stored / dense_bytes(config, length)


def passkeys(model: Any, tokenizer: Any, plan: AttentionPlan, settings: LongContextSettings) -> tuple[float, ...]:
    """Of every question, whether it is answered."""
    cells = long_context(model, tokenizer, ["passkey"], settings, cache=partial(PlanCache, model.config, plan))
    (result,) = results(cells)
    return result.scores


def named(text: str) -> tuple[str, Path]:
    """``NAME=FILE`` of an option, its file there."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise ArgumentTypeError(f"{text!r} isn't NAME=FILE")
    if not Path(path).is_file():
        raise ArgumentTypeError(f"{path}: there is no such file")
    return name, Path(path)
