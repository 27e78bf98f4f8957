"""From finished parts to a folder of every format: the first is the artifact itself, each other one a folder in it."""

import copy
import io
import json
import shutil
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from compress.artifact.compressed_tensors import quantization_config
from compress.artifact.gguf import write_gguf
from compress.artifact.gptq import open_gptq, write_gptq
from compress.artifact.shards import join
from compress.artifact.stored import open_stored
from compress.calibrate.disk import sha256
from compress.job import Job, Result
from compress.model import ModelView, open_model
from compress.origin import legal_files
from compress.share.config import MARK, marked
from compress.source import GGUF_FILE


def write_artifact(job: Job, result: Result) -> dict[str, Any]:
    """Write the artifact's folder inside the work folder; ``report.json`` and the model card come later.

    Returns:
        The report's section ``artifact``: bytes, bits a weight, formats, files with their sha256.
    """
    folder = job.folder.artifact
    if folder.exists():  # an attempt that was killed; its report would be taken for a part of this one
        shutil.rmtree(folder)
    folder.mkdir()
    params = job.report["model"]["parameters"]
    formats = {}
    for name, place in format_folders(folder, job.recipe.export.formats).items():
        place.mkdir(exist_ok=True)
        _write_format(name, job, result, place)
        formats[name] = _format_facts(place, folder, params)
    (folder / "recipe.yaml").write_text(job.recipe.to_yaml(), encoding="utf-8")
    if job.plan is not None:
        job.plan.save(folder)
    for path in (*job.files, *legal_files(job.view)):
        shutil.copyfile(path, folder / path.name)
    first = job.recipe.export.formats[0]
    shared = {"shared_layers": sorted(job.view.facts.shares)} if job.view.facts.shares else {}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "format": first,
        "weight_bytes": formats[first]["weight_bytes"],
        "bits_per_weight": formats[first]["bits_per_weight"],
        "parameters": params,
        "source_bytes": job.view.facts.checkpoint_bytes,
        "bytes_16bit": params * 2,
        "formats": formats,
        **shared,
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in files
        },
    }


def format_folders(folder: Path, formats: tuple[str, ...]) -> dict[str, Path]:
    """Where each format of an artifact lies."""
    return {name: folder / name if index else folder for index, name in enumerate(formats)}


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold weights."""
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.gguf")])


def _write_format(name: str, job: Job, result: Result, place: Path) -> None:
    if result.carried is not None:
        _carry(result.carried, place)
        return
    block = None
    if name == "compressed-tensors":
        join(result.parts, place, job.recipe.export.shard_size_mb * 1_000_000)
        if result.schemes:
            ignore = [] if job.view.family.head in result.schemes else [job.view.family.head]
            block = quantization_config(result.schemes, ignore)
    elif name == "gptq":
        block = write_gptq(job, result, place)
    else:
        write_gguf(job, result, place / GGUF_FILE)
        if place != job.folder.artifact:  # such a file needs no other beside it
            return
    artifact_config(job.view, result, block).save_pretrained(place)
    if job.view.facts.shares:
        config = place / "config.json"
        config.write_text(json.dumps(marked(json.loads(config.read_text(encoding="utf-8"))), indent=2) + "\n", "utf-8")
    job.view.generation_config().save_pretrained(place)
    job.view.tokenizer().save_pretrained(place)


def _carry(former: Path, place: Path) -> None:
    """Copy the files of an artifact's first format, byte for byte."""
    report = read_report(former)
    assert report is not None
    first = report["artifact"]["formats"][report["artifact"]["format"]]
    for name in first["files"]:
        shutil.copyfile(former / name, place / name)


def _format_facts(place: Path, folder: Path, params: int) -> dict[str, Any]:
    nbytes = sum(path.stat().st_size for path in weight_files(place))
    return {
        "path": place.relative_to(folder).as_posix(),
        "weight_bytes": nbytes,
        "bits_per_weight": round(nbytes * 8 / params, 4),
        "files": sorted(path.relative_to(folder).as_posix() for path in place.iterdir() if path.is_file()),
    }


def artifact_config(view: ModelView, result: Result, block: dict[str, Any] | None) -> Any:
    """The model's config with the block ``quantization_config``; its architecture stays what it was."""
    config = copy.deepcopy(view.config)
    config.tie_word_embeddings = view.tied and not result.untied
    config.dtype = result.dtype
    config.architectures = [view.family.architecture]
    if block is not None:
        config.quantization_config = block
    return config


def load_artifact(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a folder in one of our formats, dense and in eval mode.

    compressed-tensors is read by plain ``from_pretrained``, without its progress bars; GPTQ and GGUF by our own
    readers, because those that transformers calls need further packages, or lose what is particular to a model; and so
    are layers that share attention, which transformers doesn't know.
    """
    if not list(folder.glob("*.safetensors")):
        return open_model(str(folder / GGUF_FILE)).load_dense(dtype)
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if MARK in content:
        return open_stored(folder, str(folder)).load_dense(dtype)
    block = content.get("quantization_config") or {}
    if block.get("quant_method") == "gptq":
        return open_gptq(folder).load_dense(dtype)
    with redirect_stderr(io.StringIO()):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, use_safetensors=True)
        if hasattr(model, "ct_decompress_hook"):
            # left alone, it has weights only after the whole model was called once, and its parts can't be called
            model.hf_quantizer.compressor.decompress_model(model)
            _unwrap(model)
    return model.eval()


def _unwrap(model: PreTrainedModel) -> None:
    """Take off what decompressing leaves: a wrapper around every forward, and views that keep the whole file mapped."""
    from compressed_tensors.offload import remove_dispatch

    remove_dispatch(model)
    for module in model.modules():
        if "quantization_scheme" not in vars(module):
            continue
        for name in ("forward", "quantization_scheme", "quantization_status"):
            vars(module).pop(name, None)
        for name in [name for name in (*module._parameters, *module._buffers) if name.startswith("weight_")]:
            delattr(module, name)


REQUIRED = ("model", "recipe", "fingerprint", "artifact")  # sections of every report of ours


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report of an artifact, or None if the folder isn't one."""
    path = folder / "report.json"
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    ours = isinstance(report, dict) and all(isinstance(report.get(section), dict) for section in REQUIRED)
    return report if ours and "files" in report["artifact"] else None
