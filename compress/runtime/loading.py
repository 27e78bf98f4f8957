"""Loading an artifact or any other model."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from compress.artifact.export import load_artifact, read_report
from compress.artifact.inspect import changed_files
from compress.calibrate.errors import InputError, did_you_mean
from compress.checkpoint import read_json
from compress.device import pick_device, pick_dtype
from compress.kernels.quant_linear import Activations
from compress.model import open_model
from compress.plan import FILE as PLAN
from compress.plan import AttentionPlan
from compress.plan_order import as_loaded
from compress.runtime.linear import ACTIVATIONS, Compute
from compress.runtime.model import follow
from compress.runtime.packed import packed_folder
from compress.runtime.permute import permute_heads
from compress.runtime.plan_cache import PlanCache
from compress.runtime.rotary import without_state
from compress.share.config import MARK, folder_config
from compress.source import GGUF_FILE, download, hub_config_folder, hub_weight_bytes, locate
from compress.sparse.sea_file import read_whole_plan


def load(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    packed: bool = True,
    activations: Activations = "float",
    threads: int = 1,
    kv: bool = True,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an artifact, a Hub id, a folder or a ``.gguf`` file.

    Args:
        model: what to load. An artifact's files are checked against its report first.
        device: as on the command line.
        dtype: of the computation; None is float32 on a CPU, on a GPU bfloat16 where it has it, else float16.
        packed: keep the linear layers of an artifact packed, see ``compress.runtime.packed``; False unpacks them. What
            isn't packed in a way that is run here (docs/running.md) is dense in either case.
        activations: ``int8`` multiplies packed weights with activations rounded to 8 bits on a CPU.
        threads: of packed layers on a CPU for a few tokens.
        kv: let an artifact's attention plan decide on its KV cache; False keeps every token in the model's own type.
        trust_remote_code: let the tokenizer's own Python code run.

    Returns:
        A transformers model in eval mode, and its tokenizer.

    Raises:
        InputError: no such model, a damaged artifact, a plan made for another model, or ``int8`` on a GPU.
    """
    if activations not in ACTIVATIONS:
        near = did_you_mean(activations, ACTIVATIONS)
        raise InputError("--activations", activations, "unknown", allowed=", ".join(ACTIVATIONS), fix=near)
    place = pick_device(device)
    _check_activations(activations, place)
    compute = Compute(pick_dtype(place) if dtype is None else dtype, activations, threads)
    found = find(model, trust_remote_code=trust_remote_code)
    return found.open(compute, place, packed, kv), found.tokenizer


@dataclass(frozen=True)
class Unloaded:
    """A model that can be loaded, and what is known of it before.

    Attributes:
        context: the longest sequence that its config allows, or None.
        vocabulary: rows of its embedding, which may be padded, as the config says, or None.
        tokenizer: its tokenizer.
        load: loads it dense in the dtype given, on the CPU and in eval mode.
        folder: of a model that is quantized already, else None.
        plan: what attention does at run time, if the model is an artifact with a plan.
        cache: makes the cache of that plan.
    """

    context: int | None
    vocabulary: int | None
    tokenizer: PreTrainedTokenizerBase
    load: Callable[[torch.dtype], PreTrainedModel]
    folder: Path | None = None
    plan: AttentionPlan | None = None
    cache: Callable[[], PlanCache] | None = None

    def open(self, compute: Compute, device: torch.device, packed: bool = True, kv: bool = True) -> PreTrainedModel:
        """Load it to a device, packed where it is packed in a way that is run, or dense; with its plan, if ``kv``.

        Raises:
            InputError: a tensor that isn't what its config says, or a device that can't compute as asked for.
        """
        _check_activations(compute.activations, device)
        held = packed_folder(self.folder) if packed and self.folder is not None else None
        model = self.load(compute.dtype).to(device) if held is None else held.load(compute, device)
        without_state(model)
        if self.plan is not None and kv:
            follow(model, permute_heads(model, self.plan))
        return model


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
        context, vocabulary = (getattr(view.config, key, None) for key in ("max_position_embeddings", "vocab_size"))
        found = Unloaded(context, vocabulary, view.tokenizer(), view.load_dense)
        place = None if view.path.is_file() else view.path
    else:
        place, content = folder, read_json(folder / "config.json", str(model))
        context, vocabulary = (content.get(key) for key in ("max_position_embeddings", "vocab_size"))
        known = {"config": folder_config(folder, content)} if MARK in content else {}
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, **known)
        found = Unloaded(context, vocabulary, tokenizer, partial(load_artifact, folder), folder)
    if place is None:
        return found
    if changed := changed_files(place.resolve()):
        raise InputError("--model", model, f"is damaged: {', '.join(changed)} changed since it was written")
    if not (place / PLAN).is_file():
        return found
    config = folder_config(place, read_json(place / "config.json", str(model)))
    plan = read_whole_plan(place, config)
    assert plan is not None  # its file is there
    cache = partial(PlanCache, config, as_loaded(plan))
    return replace(found, plan=plan, cache=cache)


def _check_activations(activations: Activations, device: torch.device) -> None:
    if activations == "int8" and device.type != "cpu":
        raise InputError("--activations", activations, f"runs on a CPU, not on {device}", fix="use --device cpu")


def _compressed_folder(model: str) -> Path | None:
    """The folder of a model that is quantized already, or whose layers share; fetched if it is on the Hub. Or None."""
    found = locate(model)
    online = found.kind == "hub" and hub_weight_bytes(model) is not None
    folder = hub_config_folder(model, online) if found.kind == "hub" else found.path
    if folder is None or not (folder / "config.json").is_file():
        return None
    only_gguf = (folder / GGUF_FILE).is_file() and read_report(folder) is not None
    content = read_json(folder / "config.json", model)
    if "quantization_config" not in content and MARK not in content and not only_gguf:
        return None
    return download(model, online) if found.kind == "hub" else folder
