"""Packed weights as a model to read from: the parts that a stage left, or the files of a finished artifact.

A method that looks at a quantized model layer by layer reads it as it reads any other, and gets the weights that the
codes stand for.
"""

from dataclasses import replace
from pathlib import Path

from compress.artifact.compressed_tensors import FORMAT
from compress.artifact.export import read_report
from compress.artifact.stored import PackedCheckpoint, open_stored
from compress.calibrate.errors import InputError
from compress.checkpoint import read_json
from compress.job import Result
from compress.model import ModelView
from compress.recipe import Recipe


def stored_view(view: ModelView, result: Result) -> ModelView:
    """What a stage made of a model, to be read like the model."""
    checkpoint = PackedCheckpoint(result.parts, result.schemes, result.dtype)
    facts = replace(view.facts, tied=view.tied and not result.untied, dtype=result.dtype)
    return view.over(facts, checkpoint)


def is_packed_artifact(model: str) -> bool:
    """Whether a model is the folder of an artifact of ours whose first format is compressed-tensors, and packed."""
    folder = Path(model).expanduser()
    report = read_report(folder) if folder.is_dir() else None
    if report is None or report["artifact"]["format"] != "compressed-tensors":
        return False
    block = read_json(folder / "config.json", model).get("quantization_config") or {}
    return bool(block.get("format") == FORMAT)


def open_packed(model: str, trust_remote_code: bool = False) -> ModelView:
    """An artifact for which :func:`is_packed_artifact` holds, as a model to read from.

    Raises:
        InputError: a packed module that its config doesn't describe.
    """
    folder = Path(model).expanduser()
    view = open_stored(folder, model)
    return type(view)(replace(view.facts, packed=True), view.checkpoint, folder, trust_remote_code)


def check_carried(model: str, recipe: Recipe) -> None:
    """Whether packed weights can be taken over as the recipe wants them written.

    Raises:
        InputError: another format or type is asked for.
    """
    told = f"the weights of {model} are packed already and are taken over as they are"
    if recipe.export.formats != ("compressed-tensors",):
        formats = ", ".join(recipe.export.formats)
        raise InputError("export.formats", formats, told, allowed="compressed-tensors")
    if recipe.export.dtype != "auto":
        raise InputError("export.dtype", recipe.export.dtype, told, allowed="auto")
