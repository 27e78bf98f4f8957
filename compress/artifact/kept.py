"""Weights that no stage changes: what a recipe without the section ``weights`` makes an artifact of.

Those of a packed artifact are taken over as they are; those of any other model are written part by part in its own
type, so that no more than one layer is in memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from compress.artifact.packed_checkpoint import stored_view
from compress.artifact.stored import PackedCheckpoint
from compress.calibrate.errors import InputError
from compress.job import PROBE_TOKENS, Job, Result
from compress.model import ModelFacts, ModelView, run_layer
from compress.recipe import Recipe
from compress.weights.choices import storage_dtype
from compress.weights.tuning import rms_norm


def keep(job: Job) -> Result:
    """The model's own weights as a result.

    Raises:
        InputError: the type of ``export.dtype`` is too narrow for them.
    """
    view = job.view
    checkpoint = view.checkpoint
    dtype = storage_dtype(view.facts, job.recipe)
    probe = _probe(job)
    if view.facts.packed and isinstance(checkpoint, PackedCheckpoint):
        result = Result(checkpoint.parts, checkpoint.schemes, False, dtype, probe, torch.empty(0), view.path)
    else:
        result = Result(list(_written(job, dtype)), {}, False, dtype, probe, torch.empty(0))
    result.logits = answer(stored_view(view, result), probe)
    return result


def kept_bytes(facts: ModelFacts, recipe: Recipe) -> int:
    """Of the weights that stay as they are; 0 where the stage ``weights`` makes them."""
    if recipe.weights is not None:
        return 0
    return facts.checkpoint_bytes if facts.packed else facts.num_params * storage_dtype(facts, recipe).itemsize


@torch.no_grad()
def answer(view: ModelView, ids: Tensor) -> Tensor:
    """Logits ``[T, vocab]`` of a model for tokens ``[T]``, one layer in memory at a time."""
    hidden = view.embed_weight()[ids].unsqueeze(0)
    positions = view.position_embeddings(len(ids))
    for index in range(view.num_layers):
        layer = view.build_layer(index, view.layer_weights(index))
        hidden = run_layer(layer, hidden, positions, view.attention_mask(index, len(ids)))
    normed = rms_norm(hidden[0].double(), view.final_norm_weight().double(), view.config.rms_norm_eps)
    return normed.float() @ view.head_weight().t()


def _written(job: Job, dtype: torch.dtype) -> Iterator:
    """The files of the model, as the stage ``weights`` orders them; what an earlier attempt left is used again."""
    for name, tensors in _parts(job.view):
        path = job.folder.path / name
        if not path.exists():
            stored = {key: tensor.to(dtype) for key, tensor in tensors.items()}
            for key, tensor in stored.items():
                if not torch.isfinite(tensor).all():
                    fix = "set export.dtype=bfloat16 or float32"
                    raise InputError("export.dtype", dtype, f"is too narrow for the values of {key}", fix=fix)
            job.folder.save_tensors(name, stored)
        yield path


def _parts(view: ModelView) -> Iterator:
    family = view.family
    yield "embed.safetensors", {f"{family.embed}.weight": view.embed_weight()}
    for index in range(view.num_layers):
        prefix = f"{family.layers}.{index}."
        yield f"layer-{index:05d}.safetensors", {prefix + k: w for k, w in view.layer_weights(index).items()}
    yield "norm.safetensors", {f"{family.final_norm}.weight": view.final_norm_weight()}
    if not view.tied:
        yield "head.safetensors", {f"{family.head}.weight": view.head_weight()}


def _probe(job: Job) -> Tensor:
    """Token ids of the reload check: of the calibration text, or random ones."""
    if job.calibration is not None:
        return job.calibration.ids[0, :PROBE_TOKENS].clone()
    generator = torch.Generator().manual_seed(job.report["seed"])
    return torch.randint(job.view.config.vocab_size, (PROBE_TOKENS,), generator=generator)
