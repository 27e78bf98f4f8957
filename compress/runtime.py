"""Loading what was made, or any other model, for use."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextIteratorStreamer,
)

from compress.artifact.export import load_artifact, read_report
from compress.artifact.gguf import GGUF_FILE
from compress.artifact.inspect import inspect
from compress.calibrate.errors import InputError
from compress.checkpoint import read_json
from compress.device import pick_device
from compress.model import open_model
from compress.options import GenerateOptions
from compress.source import download, hub_config_folder, hub_weight_bytes, locate


def load(
    model: str | Path, *, device: str = "auto", dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an artifact, a Hub id, a folder or a ``.gguf`` file.

    Args:
        model: what to load. An artifact's files are checked against its report first.
        device: as on the command line.
        dtype: of the computation.
        trust_remote_code: let the tokenizer's own Python code run.

    Returns:
        A transformers model in eval mode, and its tokenizer.

    Raises:
        InputError: no such model, or a damaged artifact.
    """
    place = pick_device(device)
    found = find(model, trust_remote_code=trust_remote_code)
    return found.load(dtype).to(place), found.tokenizer


@dataclass(frozen=True)
class Unloaded:
    """A model that can be loaded, and what is known of it before.

    Attributes:
        context: the longest sequence that its config allows, or None.
        tokenizer: its tokenizer.
        load: loads it in the dtype given, on the CPU and in eval mode.
    """

    context: int | None
    tokenizer: PreTrainedTokenizerBase
    load: Callable[[torch.dtype], PreTrainedModel]


def find(model: str | Path, *, trust_remote_code: bool = False) -> Unloaded:
    """Everything that comes before loading a model: it is found, fetched and checked.

    Args:
        model: as for :func:`load`.
        trust_remote_code: as for :func:`load`.

    Raises:
        InputError: no such model, or a damaged artifact.
    """
    folder = _compressed_folder(str(model))
    if folder is None:
        view = open_model(str(model), trust_remote_code)
        return Unloaded(getattr(view.config, "max_position_embeddings", None), view.tokenizer(), view.load_dense)
    found = inspect(folder)
    if damaged := [name for name in found.damaged if "/" not in name]:  # other formats, in folders, aren't loaded
        raise InputError("--model", model, f"is damaged: {', '.join(damaged)} changed since it was written")
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    return Unloaded(found.config.get("max_position_embeddings"), tokenizer, partial(load_artifact, folder))


def _compressed_folder(model: str) -> Path | None:
    """The folder of a model that is quantized already, fetched from the Hub if it is there; None for any other."""
    found = locate(model)
    online = found.kind == "hub" and hub_weight_bytes(model) is not None
    folder = hub_config_folder(model, online) if found.kind == "hub" else found.path
    if folder is None or not (folder / "config.json").is_file():
        return None
    only_gguf = (folder / GGUF_FILE).is_file() and read_report(folder) is not None
    if "quantization_config" not in read_json(folder / "config.json", model) and not only_gguf:
        return None
    return download(model, online) if found.kind == "hub" else folder


def generate(model: str, prompt: str, options: GenerateOptions | None = None) -> Iterator[str]:
    """Answer a prompt, piece by piece.

    Yields:
        Text as it is generated.

    Raises:
        InputError: no such model, an empty prompt, or a prompt that leaves no room in the context.
    """
    options = options or GenerateOptions()
    loaded, tokenizer = load(model, device=options.device, trust_remote_code=options.trust_remote_code)
    ids = _prompt_ids(prompt, tokenizer, options.chat).to(loaded.device)
    context = getattr(loaded.config, "max_position_embeddings", None)
    if not ids.numel():
        raise InputError("--prompt", repr(prompt), "is empty")
    if context and ids.shape[1] >= context:
        raise InputError("--prompt", None, f"has {ids.shape[1]} tokens, the model's context {context}")
    room = options.max_new_tokens if context is None else min(options.max_new_tokens, context - ids.shape[1])
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if options.temperature > 0:
        sampling = {"do_sample": True, "temperature": options.temperature}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def work() -> None:
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(options.seed)
                loaded.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, streamer=streamer, **sampling
                )
        finally:
            streamer.end()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work)
        yield from streamer
        done.result()


def _prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase, chat: bool | None) -> torch.Tensor:
    if chat and not tokenizer.chat_template:
        raise InputError("--chat", None, "the model has no chat template", fix="use --no-chat")
    if chat or (chat is None and tokenizer.chat_template):
        turns = [{"role": "user", "content": prompt}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    else:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
    return ids
