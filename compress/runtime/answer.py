"""Answering a prompt, as ``compress generate`` does."""

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from transformers import PreTrainedTokenizerBase

from compress.calibrate.errors import InputError
from compress.device import pick_device, pick_dtype
from compress.generation import Piece, Sampling, Task, complete
from compress.options import GenerateOptions
from compress.runtime.linear import Compute
from compress.runtime.loading import find


def generate(model: str, prompt: str, options: GenerateOptions | None = None) -> Iterator[str]:
    """Answer a prompt, piece by piece; when the iterator is closed, generation stops.

    Yields:
        Text as it is generated.

    Raises:
        InputError: no such model, an empty prompt, or a prompt that leaves no room in the context; all before the model
            is loaded.
    """
    options = options or GenerateOptions()
    place = pick_device(options.device)
    compute = Compute(pick_dtype(place), options.activations, options.threads)
    found = find(model, trust_remote_code=options.trust_remote_code)
    ids = _prompt_ids(prompt, found.tokenizer, options.chat)
    if not ids:
        raise InputError("--prompt", repr(prompt), "is empty")
    if found.context and len(ids) >= found.context:
        raise InputError("--prompt", None, f"has {len(ids)} tokens, the model's context {found.context}")
    room = options.max_new_tokens if found.context is None else min(options.max_new_tokens, found.context - len(ids))
    loaded = found.open(compute, place, kv=options.kv)
    sampling = Sampling(temperature=options.temperature, seed=options.seed)
    pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
    stopped = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        task = Task(tuple(ids), room, sampling=sampling)
        done = pool.submit(complete, loaded, found.tokenizer, task, pieces.put, stopped.is_set)
        done.add_done_callback(lambda _: pieces.put(None))
        try:
            while (piece := pieces.get()) is not None:
                if piece.text:
                    yield piece.text
        finally:
            stopped.set()
        done.result()


def _prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase, chat: bool | None) -> list[int]:
    if chat and not tokenizer.chat_template:
        raise InputError("--chat", None, "the model has no chat template", fix="use --no-chat")
    if chat or (chat is None and tokenizer.chat_template):
        turns = [{"role": "user", "content": prompt}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        ids = tokenizer(text, add_special_tokens=False).input_ids
    else:
        ids = tokenizer(prompt).input_ids
    return list(ids)
