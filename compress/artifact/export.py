"""From finished parts to a folder that ``from_pretrained`` loads."""

import copy
import hashlib
import io
import json
import shutil
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from compress.artifact.compressed_tensors import quantization_config
from compress.artifact.shards import join
from compress.job import Job, Result
from compress.model import ModelView


def write_artifact(job: Job, result: Result) -> dict[str, Any]:
    """Write the artifact's folder inside the work folder; ``report.json`` and the model card come later.

    Returns:
        The report's section ``artifact``: bytes, bits a weight, files with their sha256.
    """
    folder = job.folder.artifact
    if folder.exists():  # an attempt that was killed; its report would be taken for a part of this one
        shutil.rmtree(folder)
    folder.mkdir()
    view = job.view
    weights = join(result.parts, folder, job.recipe.export.shard_size_mb * 1_000_000)
    config = artifact_config(view, result)
    config.save_pretrained(folder)
    view.generation_config().save_pretrained(folder)
    view.tokenizer().save_pretrained(folder)
    (folder / "recipe.yaml").write_text(job.recipe.to_yaml(), encoding="utf-8")
    nbytes = sum(size for name, size in weights.items() if name.endswith(".safetensors"))
    params = view.facts.num_params
    return {
        "format": "compressed-tensors",
        "weight_bytes": nbytes,
        "bits_per_weight": round(nbytes * 8 / params, 4),
        "parameters": params,
        "source_bytes": view.facts.checkpoint_bytes,
        "bytes_16bit": params * 2,
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())
        },
    }


def artifact_config(view: ModelView, result: Result) -> Any:
    """The model's config with the quantization block; its architecture stays what it was."""
    config = copy.deepcopy(view.config)
    config.tie_word_embeddings = view.tied and not result.untied
    config.dtype = result.dtype
    config.architectures = [view.family.architecture]
    if result.schemes:
        ignore = [] if view.family.head in result.schemes else [view.family.head]
        config.quantization_config = quantization_config(result.schemes, ignore)
    return config


def load_artifact(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Plain ``from_pretrained`` in eval mode, without its progress bars."""
    with redirect_stderr(io.StringIO()):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, use_safetensors=True)
        if hasattr(model, "ct_decompress_hook"):
            # left alone, it has weights only after the whole model was called once, and its parts can't be called
            model.hf_quantizer.compressor.decompress_model(model)
    return model.eval()


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report of an artifact, or None if the folder isn't one."""
    path = folder / "report.json"
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return report if isinstance(report, dict) and "artifact" in report else None
