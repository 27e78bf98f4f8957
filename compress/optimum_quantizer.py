"""The face that users of Hugging Face's optimum know; needs ``pip install compress[optimum]``.

from compress.optimum_quantizer import CompressQuantizer

quantizer = CompressQuantizer.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
quantizer.quantize(save_dir="out", recipe="rsq", set=("weights.bits=4",))
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from optimum.quantization_base import OptimumQuantizer

from compress.calibrate.errors import InputError
from compress.events import Event
from compress.options import RunOptions
from compress.pipeline import RunResult, run
from compress.recipe import Recipe


class CompressQuantizer(OptimumQuantizer):
    """Quantizes a model by a recipe: a thin wrapper of :func:`compress.pipeline.run`.

    Args:
        model: a Hub id, a folder with safetensors, or a ``.gguf`` file.
    """

    def __init__(self, model: str) -> None:
        self.model = model

    @classmethod
    def from_pretrained(cls, model_or_path: str | Path, file_name: str | None = None) -> "CompressQuantizer":
        """Name the model; nothing is read yet.

        Args:
            model_or_path: a Hub id, a folder with safetensors, or a ``.gguf`` file.
            file_name: of a ``.gguf`` file in the folder ``model_or_path``.
        """
        return cls(str(model_or_path if file_name is None else Path(model_or_path) / file_name))

    def quantize(
        self,
        save_dir: str | Path,
        file_prefix: str | None = None,
        *,
        recipe: str | Recipe | Mapping[str, Any] = "rsq",
        options: RunOptions | None = None,
        on_event: Callable[[Event], None] | None = None,
        **overrides: Any,
    ) -> RunResult:
        """Compress the model into ``save_dir``.

        Args:
            save_dir: folder of the artifact.
            file_prefix: not supported, since the files have the names that loaders expect.
            recipe: as :func:`compress.pipeline.run` takes it.
            options: where to run and what to override.
            on_event: told what happens.
            overrides: fields of ``options`` by name, such as ``set=("weights.bits=4",)``.

        Raises:
            InputError: what the user can mend.
        """
        if file_prefix is not None:
            raise InputError("file_prefix", file_prefix, "files have the names that loaders expect", fix="leave it out")
        chosen = replace(options or RunOptions(), **overrides)
        plain = recipe if isinstance(recipe, (str, Recipe)) else dict(recipe)
        return run(self.model, plain, out=save_dir, options=chosen, on_event=on_event)
