"""What SEA learnt for a model, as one safetensors file: the estimators' tensors, and in its header whose they are."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.calibrate.disk import replacing
from compress.calibrate.errors import InputError
from compress.fingerprint import Fingerprint, fingerprint_of
from compress.sparse.sea import Estimator, Shape
from compress.sparse.sea_fit import FitState
from compress.sparse.sea_layer import Figures

FILE = "sea.safetensors"
VERSION = 1
_KEY = "compress_sea"


@dataclass(frozen=True)
class Header:
    """Whose the tensors are: model, shape of its estimators, and every layer's figures by its number."""

    fingerprint: Fingerprint
    shape: Shape
    figures: dict[int, Figures]
    version: int = VERSION


@dataclass(frozen=True)
class Learned:
    """Estimators of a model.

    Attributes:
        header: see there.
        tensors: by ``layers.<layer>.<parameter>``, random features among them.
    """

    header: Header
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, config: Any, shape: Shape, state: FitState) -> "Learned":
        """What a finished fit learnt.

        Args:
            config: of the model, transformers'.
            shape: of the estimators.
            state: the last of the fit.
        """
        done = dict(sorted(state.finished.items()))
        header = Header(fingerprint_of(config), shape, {layer: found.figures for layer, found in done.items()})
        tensors = {
            f"layers.{layer}.{name}": tensor for layer, found in done.items() for name, tensor in found.tensors.items()
        }
        return cls(header, tensors)

    @property
    def layers(self) -> tuple[int, ...]:
        """That have an estimator."""
        return tuple(self.header.figures)

    def estimator(self, layer: int) -> Estimator:
        """Of a layer, frozen."""
        prefix = f"layers.{layer}."
        found = Estimator(self.header.shape)
        own = {name.removeprefix(prefix): part for name, part in self.tensors.items() if name.startswith(prefix)}
        found.load_state_dict(own)
        return found.requires_grad_(False).eval()

    def check(self, config: Any) -> None:
        """Compare with a model's config.

        Raises:
            InputError: the estimators are another model's; both fingerprints are told.
        """
        other = fingerprint_of(config)
        if other != self.header.fingerprint:
            problem = f"is of another model: {self.header.fingerprint}; this one: {other}"
            raise InputError(FILE, None, problem, fix="fit the estimators again for this model")

    def metadata(self) -> dict[str, str]:
        """For the header of a safetensors file."""
        content = asdict(self.header)
        content["figures"] = {
            layer: {name: value for name, value in figures.items() if math.isfinite(value)}
            for layer, figures in content["figures"].items()
        }
        return {"format": "pt", _KEY: json.dumps(content)}

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        with replacing(path) as part:
            save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, part, self.metadata())

    @classmethod
    def load(cls, path: Path, config: Any) -> "Learned":
        """The inverse of :meth:`save`, for this model.

        Raises:
            InputError: it isn't such a file, or is of another version or model.
        """
        try:
            with safe_open(path, "pt") as file:
                content, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(FILE, path, f"can't be read ({error})") from error
        found = cls(_header(content, path), tensors)
        found.check(config)
        found._complete(path)
        return found

    def _complete(self, path: Path) -> None:
        """Whether the tensors are those of the shape."""
        wanted = {name: tensor.shape for name, tensor in Estimator(self.header.shape).state_dict().items()}
        expected = {f"layers.{layer}.{name}": shape for layer in self.layers for name, shape in wanted.items()}
        wrong = sorted(
            name
            for name in expected.keys() | self.tensors.keys()
            if name not in self.tensors or self.tensors[name].shape != expected.get(name)
        )
        if wrong:
            raise InputError(FILE, path, f"its tensors aren't those of its header, {wrong[0]} for one")


def _header(metadata: Mapping[str, str], path: Path) -> Header:
    if _KEY not in metadata:
        raise InputError(FILE, path, "has no estimators of SEA")
    try:
        content = json.loads(metadata[_KEY])
        if content["version"] != VERSION:
            problem = f"is of version {content['version']}"
            raise InputError(FILE, path, problem, allowed=f"version {VERSION}", fix="fit the estimators again")
        return TypeAdapter(Header).validate_python(content)
    except (KeyError, TypeError, json.JSONDecodeError, ValidationError) as error:
        raise InputError(FILE, path, f"its header can't be read ({str(error).splitlines()[0]})") from error
