"""One of the two models of a benchmark, in the process that measures it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import compressed_tensors  # noqa: F401  (the libraries belong to the base line of memory, not to a model)
import torch
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from compress.artifact.export import read_report, weight_files
from compress.calibrate.errors import InputError
from compress.checkpoint import read_json
from compress.evalsuite.efficiency import (
    HighWater,
    Pass,
    allocated,
    free_bytes,
    kv_bytes,
    random_prompt,
    timed_pass,
)
from compress.memory import release
from compress.model import open_config, open_model
from compress.runtime import load
from compress.share.config import folder_config
from compress.source import download, hub_config_folder, hub_weight_bytes, locate

ADVICE = "free some, or try --one-at-a-time, a shorter --prompt-tokens, shorter --lengths"
_WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Subject:
    """A model to measure, and the cache that it answers with.

    Attributes:
        model: an artifact, a Hub id, a folder, a ``.gguf`` file, or a function that returns a loaded model. Functions
            are called in another process, so pickle must be able to send them: functions of a module, or
            ``functools.partial`` of one.
        cache: makes a fresh cache for every prompt; None is the model's own.
        name: what the report calls it; None takes the model's.
    """

    model: str | Path | Callable[[], PreTrainedModel]
    cache: Callable[[], Cache] | None = None
    name: str | None = None


@dataclass(frozen=True)
class Settings:
    """How both models are measured; nothing is left to be chosen."""

    prompt_tokens: int
    new_tokens: int
    lengths: tuple[int, ...]
    device: str
    dtype: torch.dtype
    seed: int
    trust_remote_code: bool
    activations: Literal["float", "int8"] = "float"
    packed_threads: int = 1

    def check(self, context: int | None) -> None:
        """Compare with a model's context.

        Raises:
            InputError: something is longer.
        """
        if context is None:
            return
        beyond, room = f"beyond the context of {context} tokens", context - self.new_tokens
        if room < 1:
            raise InputError("--new-tokens", self.new_tokens, beyond, allowed=f"2 to {context - 1}")
        if self.prompt_tokens > room:
            problem = f"with {self.new_tokens} new ones {beyond}"
            raise InputError("--prompt-tokens", self.prompt_tokens, problem, allowed=f"1 to {room}")
        if self.lengths and max(self.lengths) > context:
            raise InputError("--lengths", max(self.lengths), beyond, allowed=f"2 to {context}")


@dataclass(frozen=True)
class Facts:
    """What is known of a model once it is loaded.

    Attributes:
        disk: bytes of its weight files; None for one that a function returned.
        memory: bytes of the weights as they lie in memory.
        elements: how many numbers those bytes hold.
        load_peak: memory high water while loading, None where the system doesn't say.
        resettable: whether the high water can be begun anew, so that loading and generating are told apart.
        free: memory left for another model.
        seconds: that loading took.
        dtype: of the computation.
        device: where it is, with the GPU's name.
        threads: of PyTorch.
    """

    disk: int | None
    memory: int
    elements: int
    load_peak: int | None
    resettable: bool
    free: int
    seconds: float
    dtype: str
    device: str
    threads: int


@dataclass(frozen=True)
class Side:
    """A loaded model, warmed up, and how to measure it."""

    model: PreTrainedModel
    cache: Callable[[], Cache] | None
    settings: Settings
    water: HighWater
    facts: Facts


@contextmanager
def _memory_told() -> Iterator[None]:
    """A GPU that is too small is no fault of ours; on a CPU the system ends the process instead."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError("--device", "cuda", "its memory ran out", fix=ADVICE) from error


@dataclass(frozen=True)
class OpenSide:
    """Loads a model in the process where it is called."""

    subject: Subject
    settings: Settings

    @_memory_told()
    def __call__(self) -> Side:
        """Load the model, look at its memory, and let it answer once, so that no first time is timed.

        Raises:
            InputError: as :func:`compress.load`; a prompt or length beyond the context.
        """
        settings, source = self.settings, self.subject.model
        device = torch.device(settings.device)
        torch.ones(64, 64, device=device).sum().item()
        release()
        water = HighWater(device)
        water.reset()
        started = time.perf_counter()
        if callable(source):
            model = source().to(device).eval()
        else:
            model = load(
                source,
                device=settings.device,
                dtype=settings.dtype,
                activations=settings.activations,
                threads=settings.packed_threads,
                trust_remote_code=settings.trust_remote_code,
            )[0]
        seconds = time.perf_counter() - started
        settings.check(getattr(model.config, "max_position_embeddings", None))
        weights = allocated(model)
        facts = Facts(
            disk=None if callable(source) else _disk_bytes(str(source)),
            memory=weights.nbytes,
            elements=weights.elements,
            load_peak=water.peak(),
            resettable=water.resettable,
            free=free_bytes(device),
            seconds=seconds,
            dtype=str(model.dtype).removeprefix("torch."),
            device=f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device),
            threads=torch.get_num_threads(),
        )
        prompt = random_prompt(model, settings.prompt_tokens, settings.seed)
        timed_pass(model, prompt, min(settings.new_tokens, _WARM_UP_TOKENS), self.subject.cache)
        return Side(model, self.subject.cache, settings, water, facts)


def facts(side: Side) -> Facts:
    """What loading has shown."""
    return side.facts


@_memory_told()
def timed_turn(side: Side, number: int) -> tuple[Pass, int | None]:
    """One answer, timed, and the memory high water meanwhile; every number has a prompt of its own."""
    release()
    side.water.reset()
    prompt = random_prompt(side.model, side.settings.prompt_tokens, side.settings.seed + number)
    done = timed_pass(side.model, prompt, side.settings.new_tokens, side.cache)
    return done, side.water.peak()


@_memory_told()
def cache_bytes(side: Side) -> list[int]:
    """Bytes allocated by the cache at each of the lengths."""
    seed = side.settings.seed
    return [kv_bytes(side.model, random_prompt(side.model, n, seed), side.cache) for n in side.settings.lengths]


def is_compressed(folder: Path, model: str) -> bool:
    """Whether a folder holds packed weights: an artifact, or another model with a quantization_config.

    Raises:
        InputError: it has no config.
    """
    return read_report(folder) is not None or "quantization_config" in read_json(folder / "config.json", model)


def open_any_config(model: str) -> tuple[PreTrainedConfig, str]:
    """Config and name of a model, also of one whose weights are packed already; no weights are read or fetched.

    Raises:
        InputError: no such model, or a config that isn't valid.
    """
    found = locate(model)
    folder = found.path
    if folder is None:
        folder = hub_config_folder(model, online=hub_weight_bytes(model) is not None)
    if not folder.is_dir() or not is_compressed(folder, model):
        facts = open_config(model)
        return facts.config, facts.name
    try:
        config = folder_config(folder, read_json(folder / "config.json", model))
    except (OSError, TypeError, ValueError) as error:
        problem = f"its config isn't valid ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        raise InputError("--model", model, problem) from error
    return config, model if found.kind == "hub" else folder.resolve().name


def _disk_bytes(model: str) -> int:
    """Size of the weight files, which are here by now."""
    path = locate(model).path or download(model, online=False)
    if path.is_dir() and is_compressed(path, model):
        return sum(file.stat().st_size for file in weight_files(path))
    return open_model(model).facts.checkpoint_bytes
