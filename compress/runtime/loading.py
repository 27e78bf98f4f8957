"""Loading an artifact or any other model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from compress.artifact.export import load_artifact, read_report
from compress.artifact.inspect import intact
from compress.calibrate.errors import InputError, did_you_mean
from compress.checkpoint import read_json
from compress.device import pick_device
from compress.kernels.quant_linear import Activations
from compress.model import open_model
from compress.runtime.linear import ACTIVATIONS, Compute
from compress.runtime.packed import packed_folder
from compress.source import GGUF_FILE, download, hub_config_folder, hub_weight_bytes, locate


def load(
    model: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    packed: bool = True,
    activations: Activations = "float",
    threads: int = 1,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load an artifact, a Hub id, a folder or a ``.gguf`` file.

    Args:
        model: what to load. An artifact's files are checked against its report first.
        device: as on the command line.
        dtype: of the computation.
        packed: keep the linear layers of an artifact packed, see ``compress.runtime.packed``; False unpacks them. What
            isn't packed in a way that is run here (docs/running.md) is dense in either case.
        activations: ``int8`` multiplies packed weights with activations rounded to 8 bits on a CPU.
        threads: of packed layers on a CPU for a few tokens.
        trust_remote_code: let the tokenizer's own Python code run.

    Returns:
        A transformers model in eval mode, and its tokenizer.

    Raises:
        InputError: no such model, a damaged artifact, or ``int8`` on a GPU.
    """
    if activations not in ACTIVATIONS:
        near = did_you_mean(activations, ACTIVATIONS)
        raise InputError("--activations", activations, "unknown", allowed=", ".join(ACTIVATIONS), fix=near)
    if threads < 1:
        raise InputError("threads", threads, "nothing would be computed", allowed="from 1")
    place = pick_device(device)
    _check_activations(activations, place)
    found = find(model, trust_remote_code=trust_remote_code)
    compute = Compute(dtype, activations, threads)
    return found.open(compute, place, packed), found.tokenizer


@dataclass(frozen=True)
class Unloaded:
    """A model that can be loaded, and what is known of it before.

    Attributes:
        context: the longest sequence that its config allows, or None.
        vocabulary: rows of its embedding, which may be padded, as the config says, or None.
        tokenizer: its tokenizer.
        load: loads it dense in the dtype given, on the CPU and in eval mode.
        folder: of a model that is quantized already, else None.
    """

    context: int | None
    vocabulary: int | None
    tokenizer: PreTrainedTokenizerBase
    load: Callable[[torch.dtype], PreTrainedModel]
    folder: Path | None = None

    def open(self, compute: Compute, device: torch.device, packed: bool = True) -> PreTrainedModel:
        """Load it to a device, packed where it is packed in a way that is run, or dense.

        Raises:
            InputError: a tensor that isn't what its config says, or a device that can't compute as asked for.
        """
        _check_activations(compute.activations, device)
        held = packed_folder(self.folder) if packed and self.folder is not None else None
        return self.load(compute.dtype).to(device) if held is None else held.load(compute, device)


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
        return Unloaded(context, vocabulary, view.tokenizer(), view.load_dense)
    config = read_json(folder / "config.json", str(model))
    if damaged := _damaged(folder.resolve()):
        raise InputError("--model", model, f"is damaged: {', '.join(damaged)} changed since it was written")
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    context, vocabulary = (config.get(key) for key in ("max_position_embeddings", "vocab_size"))
    return Unloaded(context, vocabulary, tokenizer, partial(load_artifact, folder), folder)


def _check_activations(activations: Activations, device: torch.device) -> None:
    if activations == "int8" and device.type != "cpu":
        raise InputError("--activations", activations, f"runs on a CPU, not on {device}", fix="use --device cpu")


def _damaged(folder: Path) -> list[str]:
    """Files of an artifact, or of one of its other formats, that aren't those that its report names."""
    for home, prefix in ((folder, ""), (folder.parent, f"{folder.name}/")):
        if report := read_report(home):
            files = {name: facts for name, facts in report["artifact"]["files"].items() if name.startswith(prefix)}
            own = [name for name in files if "/" not in name.removeprefix(prefix)]
            return [name for name in own if not intact(home / name, files[name])]
    return []


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
