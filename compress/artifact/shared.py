"""From the stage that lets layers share to the stages behind it, and to the artifact: the changed model, in files."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict

import torch
from pydantic import TypeAdapter
from torch import Tensor
from transformers import PreTrainedModel

from compress.artifact.stored import PackedCheckpoint
from compress.calibrate.errors import InputError
from compress.job import Job
from compress.model import ModelFacts
from compress.plan import Share
from compress.recipe import Recipe
from compress.share.view import shared_view

FORMAT = "compressed-tensors"
_STATE = "handed_over"


def check_shared(recipe: Recipe) -> None:
    """Find from the recipe alone what can't be made of a model whose layers share.

    Raises:
        InputError: a format that has no place for it; tuning of the whole quantized model.
    """
    others = [name for name in recipe.export.formats if name != FORMAT]
    if others:
        problem = "has no place for layers that share attention"
        raise InputError("export.formats", others[0], problem, allowed=FORMAT)
    if recipe.weights is not None and recipe.weights.tune_epochs:
        problem = "doesn't run layers that share attention"
        raise InputError("weights.tune_epochs", recipe.weights.tune_epochs, problem, allowed="0")


def hand_over(job: Job, model: PreTrainedModel, shares: Mapping[int, Share]) -> None:
    """Let the stages behind read a changed model, and the artifact be made of it.

    Its tensors are written to the work folder: in the type of the model's files where that loses nothing, else in
    float32, whatever the artifact's type will be. ``job.view`` is a view of them afterwards.

    Args:
        job: of the stage.
        model: behind ``share_layers``, with all that was fitted or learned.
        shares: its layers that share, as they were given to ``share_layers``.
    """
    facts = shared_view(job.view, job.view.checkpoint, shares).facts
    files = []
    for name, names in _parts(facts):
        job.folder.save_tensors(name, {key: _stored(model.get_parameter(key), facts.dtype) for key in names})
        files.append(name)
    job.folder.stage("share")[_STATE] = {
        "files": files,
        "shares": {str(layer): asdict(share) for layer, share in sorted(shares.items())},
    }
    job.folder.save()
    taken_up(job)


def taken_up(job: Job) -> dict[int, Share] | None:
    """The layers that share, if an earlier attempt of this run has handed them over; then ``job.view`` has them."""
    state = job.folder.stage("share").get(_STATE)
    if state is None:
        return None
    shares = {int(layer): TypeAdapter(Share).validate_python(found) for layer, found in state["shares"].items()}
    files = [job.folder.path / name for name in state["files"]]
    job.view = shared_view(job.view, PackedCheckpoint(files, {}, job.view.dtype), shares)
    return shares


def _parts(facts: ModelFacts) -> Iterator[tuple[str, list[str]]]:
    """Names of tensors, by file."""
    names, layers = list(facts.tensor_shapes()), f"{facts.family.layers}."
    yield "shared-ends.safetensors", [name for name in names if not name.startswith(layers)]
    for index in range(facts.num_layers):
        prefix = f"{layers}{index}."
        yield f"shared-{index:05d}.safetensors", [name for name in names if name.startswith(prefix)]


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In a type if that changes no value, else in float32."""
    plain = tensor.detach().cpu()
    narrow = plain.to(dtype)
    return (narrow if torch.equal(narrow.float(), plain.float()) else plain.float()).contiguous()
