"""What SEA learnt for a model, as one safetensors file: the estimators' tensors, and in its header whose they are."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from compress.calibrate.disk import replacing
from compress.calibrate.errors import InputError
from compress.fingerprint import Fingerprint, fingerprint_of
from compress.plan import FILE as PLAN
from compress.plan import AttentionPlan, read_plan
from compress.sparse.sea import Estimator, Shape
from compress.sparse.sea_fit import FitState
from compress.sparse.sea_layer import Figures

FILE = "sea.safetensors"
POLICY = "sea"
VERSION = 1
_KEY = "compress_sea"


@dataclass(frozen=True)
class Header:
    """Whose the tensors are.

    Attributes:
        fingerprint: of the model.
        shape: of an estimator for all heads of a layer.
        heads: the KV heads that a layer's estimator is for, by its number.
        figures: of the fit, alike.
        version: of the file.
    """

    fingerprint: Fingerprint
    shape: Shape
    heads: dict[int, tuple[int, ...]]
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
    _made: dict[int, Estimator] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(
        cls, config: Any, shape: Shape, state: FitState, chosen: Mapping[int, Sequence[int]] | None = None
    ) -> "Learned":
        """What a finished fit learnt.

        Args:
            config: of the model, transformers'.
            shape: of the estimators.
            state: the last of the fit.
            chosen: as the fit had it.
        """
        done = dict(sorted(state.finished.items()))
        every = tuple(range(shape.kv_heads))
        heads = {layer: every if chosen is None else tuple(chosen[layer]) for layer in done}
        header = Header(fingerprint_of(config), shape, heads, {layer: found.figures for layer, found in done.items()})
        tensors = {
            f"layers.{layer}.{name}": tensor for layer, found in done.items() for name, tensor in found.tensors.items()
        }
        return cls(header, tensors)

    @property
    def layers(self) -> tuple[int, ...]:
        """That have an estimator."""
        return tuple(self.header.figures)

    def estimator(self, layer: int) -> Estimator:
        """Of a layer, frozen; made once."""
        if layer in self._made:
            return self._made[layer]
        prefix = f"layers.{layer}."
        found = Estimator(self.header.shape.of(len(self.header.heads[layer])))
        own = {name.removeprefix(prefix): part for name, part in self.tensors.items() if name.startswith(prefix)}
        found.load_state_dict(own)
        self._made[layer] = found.requires_grad_(False).eval()
        return found

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
        header = self.header
        sizes = {len(heads) for heads in header.heads.values()}
        parts = {size: Estimator(header.shape.of(size)).state_dict() for size in sizes}
        expected = {
            f"layers.{layer}.{name}": tensor.shape
            for layer, heads in header.heads.items()
            for name, tensor in parts[len(heads)].items()
        }
        wrong = sorted(
            name
            for name in expected.keys() | self.tensors.keys()
            if name not in self.tensors or self.tensors[name].shape != expected.get(name)
        )
        if wrong:
            raise InputError(FILE, path, f"its tensors aren't those of its header, {wrong[0]} for one")


def read_whole_plan(folder: Path, config: Any) -> AttentionPlan | None:
    """The plan of an artifact with what its policies have learnt, or None if it has none.

    Args:
        folder: of the artifact.
        config: of the model.

    Raises:
        InputError: as :func:`compress.plan.read_plan` and :meth:`Learned.load`; estimators of other heads.
    """
    plan = read_plan(folder)
    if plan is None or POLICY not in plan.searches:
        return plan
    plan = replace(plan, estimators=Learned.load(folder / FILE, config))
    check_learned(plan)
    return plan


def check_learned(plan: AttentionPlan) -> None:
    """See that the heads that search by estimators have them.

    Raises:
        InputError: they haven't, or the estimators are for others.
    """
    if POLICY not in plan.searches:
        return
    learned: Learned | None = plan.estimators
    if learned is None:
        problem = f"has heads that search by estimators, and {FILE} beside it wasn't read"
        raise InputError(PLAN, None, problem, fix="read it with compress.sparse.sea_file.read_whole_plan")
    for index, layer in enumerate(plan.layers):
        wanted = [number for number, head in enumerate(layer.heads) if head.topk and head.topk.policy == POLICY]
        taken = layer.share is not None and layer.share.mode == "mask"
        found = learned.header.heads.get(index, ())
        if wanted and not taken and len(found) != len(wanted):
            problem = f"layer {index} has estimators of KV heads {list(found)}, and {wanted} search by them"
            raise InputError(FILE, None, problem, fix="fit the estimators again for this plan")


def _header(metadata: Mapping[str, str], path: Path) -> Header:
    if _KEY not in metadata:
        raise InputError(FILE, path, "has no estimators of SEA")
    try:
        content = json.loads(metadata[_KEY])
        if content["version"] != VERSION:
            problem = f"is of version {content['version']}"
            raise InputError(FILE, path, problem, allowed=f"version {VERSION}", fix="fit the estimators again")
        found = TypeAdapter(Header).validate_python(content)
        if found.heads.keys() != found.figures.keys() or not all(found.heads.values()):
            raise KeyError("heads")
        return found
    except (KeyError, TypeError, json.JSONDecodeError, ValidationError) as error:
        raise InputError(FILE, path, f"its header can't be read ({str(error).splitlines()[0]})") from error
