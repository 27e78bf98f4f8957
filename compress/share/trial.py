"""A model in memory whose layers share on trial, and the residual streams of windows in front of its layers, in files.

A trial changes few layers, so that only what lies behind them has to be computed again.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.calibrate.stream import ActivationFile
from compress.families import FAMILIES
from compress.heads.layers import Layers
from compress.plan import Share
from compress.share.echo import ECHO, Echo
from compress.share.modules import consumer_of

HEAD_TOKENS = 256  # whose logits exist at once


@dataclass(frozen=True)
class Fitted:
    """Projections of a consumer in the place of its own.

    Attributes:
        output: weight of the output projection, [hidden, H * D].
        value: weight of the value projection, [Hkv * D, hidden]; None for its own.
    """

    output: Tensor
    value: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """For a file."""
        return {"output": self.output} | ({} if self.value is None else {"value": self.value})


class Trial:
    """A dense model, frozen, and what its layers share for now; use it within :meth:`at_work`.

    Args:
        model: of a family in ``compress.families``; its own attention modules come back at the end.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.view = Layers(model)
        self.shares: dict[int, Share] = {}
        self._name = FAMILIES[self.view.config.model_type].attention
        self._norm = FAMILIES[self.view.config.model_type].input_norm
        self._decoder: Any = model.base_model
        self._echo = Echo()
        self._marks: dict[int, str] = {}
        self.dense: list[Any] = [layer.get_submodule(self._name) for layer in self._decoder.layers]

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within it layers can be run; behind it the model is dense again."""
        with torch.no_grad(), self.view.tapped():
            try:
                yield
            finally:
                self.share({})

    def share(self, shares: Mapping[int, Share], fitted: Mapping[int, Fitted] | None = None) -> None:
        """Let layers share, and no others.

        Args:
            shares: by layer.
            fitted: projections of some of them.
        """
        sources = {share.source for share in shares.values()}
        for index, dense in enumerate(self.dense):
            module = dense
            if index in shares:
                module = consumer_of(dense, shares[index], self._echo)
            setattr(self._decoder.layers[index], self._name, module)
            if index in sources:
                setattr(dense, ECHO, self._echo)
            elif hasattr(dense, ECHO):
                delattr(dense, ECHO)
        self.shares = dict(shares)
        self._marks.clear()
        for index, own in (fitted or {}).items():
            self.put(index, own)

    def exchange(self, index: int, share: Share) -> None:
        """Let a layer that shares do it in another way, from the same layer; its projections are its own again."""
        setattr(self._decoder.layers[index], self._name, consumer_of(self.dense[index], share, self._echo))
        self.shares[index] = share
        self._marks.pop(index, None)

    def put(self, index: int, fitted: Fitted) -> None:
        """Give a consumer fitted projections; the dense module's are left alone."""
        put(self.attention(index), fitted)
        digest = hashlib.sha256()
        for tensor in fitted.tensors().values():
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        self._marks[index] = digest.hexdigest()

    def before(self, layer: int) -> str:
        """What shares before a layer, and how it was fitted, in short."""
        found = [(n, share, self._marks.get(n)) for n, share in sorted(self.shares.items()) if n < layer]
        return hashlib.sha256(repr(found).encode()).hexdigest()[:12] if found else "dense"

    def attention(self, index: int) -> Any:
        """The attention module of a layer as it is."""
        return getattr(self._decoder.layers[index], self._name)

    def normed(self, index: int, hidden: Tensor) -> Tensor:
        """What a layer's attention gets of the residual stream."""
        found: Tensor = getattr(self._decoder.layers[index], self._norm)(hidden)
        return found

    def run(self, hidden: Tensor, first: int, last: int) -> Tensor:
        """Layers ``first`` to ``last - 1`` on one window [1, T, hidden]; what owners leave stays for the next call."""
        positions = self.view.positions(hidden)
        for index in range(first, last):
            hidden = self.view.run(index, hidden, positions, None)
        return hidden

    def attend(self, module: nn.Module, index: int, hidden: Tensor) -> Tensor:
        """An attention module's output [1, T, hidden] for a layer's residual stream."""
        normed = self.normed(index, hidden)
        positions = self.view.positions(normed)
        found: Tensor = module(hidden_states=normed, position_embeddings=positions, attention_mask=None)[0]
        return found

    def forget(self) -> None:
        """Drop what owners have left."""
        self._echo.clear()

    def nll(self, hidden: Tensor, ids: Tensor) -> float:
        """Summed negative log-likelihood of a window's tokens but the first.

        Args:
            hidden: the residual stream behind the last layer, [1, T, hidden].
            ids: [T].
        """
        total = 0.0
        for states, wanted in zip(hidden[0, :-1].split(HEAD_TOKENS), ids[1:].split(HEAD_TOKENS), strict=True):
            logits = self.view.logits(states).float()
            total += float(nn.functional.cross_entropy(logits, wanted.to(logits.device), reduction="sum"))
        return total


class Course:
    """The residual streams of windows in front of chosen layers, computed when they are asked for.

    A file is named after what shares in front of it, so that an interrupted run finds what it has finished.

    Args:
        trial: within ``at_work``.
        ids: windows, [N, T].
        folder: where files go; it belongs to these windows.
        stops: layers in front of which streams are kept; those of owners must be among them.
    """

    def __init__(self, trial: Trial, ids: Tensor, folder: Path, stops: Sequence[int]) -> None:
        self.trial, self.ids, self.folder = trial, ids, folder
        self.stops = sorted({0, *stops})
        self._files: dict[int, ActivationFile] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def stream(self, window: int, layer: int) -> Tensor:
        """The stream of a window in front of a layer, [1, T, hidden]; what the layer's owner has left is at hand."""
        stop = self._start(layer, layer)
        self.fill(stop)
        return self.trial.run(self._at(stop, window), stop, layer)

    def final(self, window: int, layer: int) -> Tensor:
        """The stream of a window behind all layers, run from some stop at or before ``layer`` on."""
        stop = self._start(layer, self.trial.view.count - 1)
        self.fill(stop)
        return self.trial.run(self._at(stop, window), stop, self.trial.view.count)

    def fill(self, layer: int) -> None:
        """Make the stream in front of a stop, if it isn't there."""
        if layer in self._files:
            return
        if not self._files:
            self._write(0, (self.trial.view.embed(ids) for ids in self.ids))
        for stop in self.stops:
            if stop <= layer and stop not in self._files:
                first = self._start(stop - 1, stop - 1)
                self._write(stop, (self.trial.run(self._at(first, w), first, stop) for w in range(len(self.ids))))

    def changed(self, layer: int) -> None:
        """Forget streams behind a layer, whose attention isn't what it was."""
        for stop in [stop for stop in self._files if stop > layer]:
            self.drop(stop)

    def drop(self, layer: int) -> None:
        """Forget the stream in front of a layer."""
        file = self._files.pop(layer, None)
        if file is not None:
            file.path.unlink()

    def close(self) -> None:
        """Remove all files."""
        self.changed(-1)

    def _start(self, first: int, last: int) -> int:
        """The last stop at or before ``first`` behind which owners stand of all that take from them up to ``last``."""
        while True:
            stop = max(stop for stop in self.stops if stop <= first)
            shares = self.trial.shares.items()
            first = min((share.source for index, share in shares if stop <= index <= last), default=stop)
            if first >= stop:
                return stop

    def _at(self, stop: int, window: int) -> Tensor:
        return self._files[stop][window][None].to(self.trial.view.device)

    def _write(self, stop: int, streams: Iterator[Tensor]) -> None:
        path = self.folder / f"stream-{stop:05d}-{self.trial.before(stop)}.bin"
        self._files[stop] = whole(path, (*self.ids.shape, self.trial.view.config.hidden_size), streams)
        self.trial.forget()


def whole(path: Path, shape: tuple[int, ...], windows: Iterator[Tensor]) -> ActivationFile:
    """A file of windows' activations that is there whole or not at all; an earlier attempt's is used as it is.

    Args:
        path: the file.
        shape: [N, T, width].
        windows: [1, T, width] each, computed only if they are needed.
    """
    if not path.exists():
        part = path.with_name(path.name + ".writing")
        part.unlink(missing_ok=True)
        file = ActivationFile(part, shape)  # type: ignore[arg-type]
        for index, window in enumerate(windows):
            file[index] = window[0].float()
        del file
        part.replace(path)
    return ActivationFile(path, shape)  # type: ignore[arg-type]


def put(attention: Any, fitted: Fitted) -> None:
    """Give a consumer fitted projections, new modules in the place of those it took over."""
    for name, weight in (("o_proj", fitted.output), ("v_proj", fitted.value)):
        if weight is not None:
            former = getattr(attention, name)
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=former.bias is not None, device="meta")
            linear.weight = nn.Parameter(weight.to(former.weight), requires_grad=False)
            linear.bias = former.bias
            setattr(attention, name, linear)
