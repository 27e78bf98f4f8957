"""End-to-end tuning: once every layer is solved, scales and norms learn from the dense model, codes stay as they are.

GPTQ fits each layer to its own inputs; what that leaves over in the model's answers is the business of this pass:

    min over s, g   mean over tokens t   KL( p_dense(. | x_<t) || p_quantized(. | x_<t; codes, s, g) )

with every scale ``s = s0 (1 + d)`` and every norm weight ``g = g0 (1 + d)``, by Adam on ``d``: the second phase of
EfficientQAT (arXiv 2407.11062, section 3.3), with the dense model's answers as targets, not the text's next tokens.

The model is in memory one layer at a time here too. A step keeps the inputs of every layer for its few windows in a
file, goes forward without gradients, then back: a layer is built again, runs once more with gradients, and its ``d``
are updated before the layer below is built. Results don't depend on the number of threads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from compress.artifact.compressed_tensors import centred_codes, dequantized
from compress.calibrate.stream import ActivationFile
from compress.calibrate.workers import Workers
from compress.model import ModelView, run_layer
from compress.weights.learned import Learned

HEAD_TOKENS = 64  # whose logits are in memory at once, in every thread


@dataclass(frozen=True)
class Parts:
    """The files of a quantized model, as the stage ``weights`` leaves them.

    Attributes:
        layers: one file a decoder layer.
        embed: the embedding.
        norm: the final norm.
        head: the output head, possibly packed; the embedding's file where the two are tied.
        bits: width of every packed module by name, of the head too if it is packed.
    """

    layers: list[Path]
    embed: Path
    norm: Path
    head: Path
    bits: Mapping[str, int]

    def head_weight(self, name: str) -> Tensor:
        """The output head ``[vocab, hidden]`` float32; ``name`` is its module's."""
        tensors = load_file(self.head)
        if name in self.bits:
            return dequantized(tensors, name, self.bits[name])
        return next(iter(tensors.values())).float()


class Tuner:
    """The quantized model beside the answers of the dense one.

    Args:
        view: the dense model.
        parts: the quantized one.
        device: where layers run.
        workers: the threads that treat windows side by side.
        folder: for activations.
        ids: token windows ``[windows, T]``, of training and held-out text alike.
        batch: windows a step.
    """

    def __init__(
        self,
        view: ModelView,
        parts: Parts,
        device: torch.device,
        workers: Workers,
        folder: Path,
        ids: Tensor,
        batch: int,
    ) -> None:
        self.view, self.parts, self.device, self.workers, self.ids = view, parts, device, workers, ids
        self.batch = min(batch, len(ids))
        self.embed = next(iter(load_file(parts.embed).values()))
        self.norm_name, self.norm = self._final_norm()
        self.head = parts.head_weight(view.family.head).to(device)
        self.dense_head = view.head_weight().to(device)
        length, width = ids.shape[1], view.config.hidden_size
        self.targets = ActivationFile(folder / "targets.bin", (len(ids), length, width))
        self.hidden = ActivationFile(folder / "steps.bin", (view.num_layers + 1, self.batch * length, width))
        cos, sin = view.position_embeddings(length)
        self.positions = (cos.to(device), sin.to(device))

    def close(self) -> None:
        """Remove the activations."""
        self.targets.path.unlink(missing_ok=True)
        self.hidden.path.unlink(missing_ok=True)

    def shapes(self) -> dict[str, torch.Size]:
        """The tensors that can be learnt."""
        found = {self.norm_name: self.norm.shape}
        for index, path in enumerate(self.parts.layers):
            prefix = f"{self.view.family.layers}.{index}."
            norms = {f"{prefix}{name}.weight" for name in (self.view.family.input_norm, self.view.family.post_norm)}
            for name, tensor in load_file(path).items():
                if name.endswith(".weight_scale") or name in norms:
                    found[name] = tensor.shape
        return found

    def teach(self) -> None:
        """Run the dense model over all windows and keep its last hidden states, after the final norm."""
        view = self.view
        embed = view.embed_weight()
        for i, ids in enumerate(self.ids):
            self.targets[i] = embed[ids]
        del embed
        targets = [self.targets[i] for i in range(len(self.ids))]
        for index in range(view.num_layers):
            layer = view.build_layer(index, view.layer_weights(index)).to(self.device)
            self._through(layer, index, targets, targets)
        gain = view.final_norm_weight()
        for i in range(len(self.ids)):
            self.targets[i] = rms_norm(self.targets[i], gain, view.config.rms_norm_eps)

    def divergence(self, learned: Learned, windows: range) -> float:
        """Mean KL from the dense model over some windows, in nats a token."""
        total = 0.0
        for start in range(windows.start, windows.stop, self.batch):
            chosen = list(range(start, min(start + self.batch, windows.stop)))
            self._forward(learned, chosen)
            total += sum(found[0] for found in self._losses(learned, chosen, gradient=False))
        return total / len(windows)

    def step(self, learned: Learned, windows: list[int], rate: float) -> float:
        """One step of Adam on a few windows; returns their mean KL before it, in nats a token."""
        self._forward(learned, windows)
        found = self._losses(learned, windows, gradient=True)
        gradients = {slot: part[1] / len(windows) for slot, part in enumerate(found) if part[1] is not None}
        norm_gradient = sum(part[2] for part in found if part[2] is not None) / len(windows)
        learned.update(self.norm_name, (norm_gradient * self.norm).cpu(), rate)
        for index in reversed(range(self.view.num_layers)):
            gradients = self._backward(index, learned, gradients, rate)
        learned.steps += 1
        return sum(part[0] for part in found) / len(windows)

    def tuned(self, index: int, learned: Learned) -> dict[str, Tensor]:
        """The tensors of a layer's file with what was learnt, in the file's types."""
        tensors = load_file(self.parts.layers[index])
        return {
            name: (t.float() * learned.factor(name)).to(t.dtype) if name in learned.d else t
            for name, t in tensors.items()
        }

    def _forward(self, learned: Learned, windows: list[int]) -> None:
        """The inputs of every layer, and the outputs of the last, of some windows."""
        for slot, window in enumerate(windows):
            self._slot(0, slot).copy_(self.embed[self.ids[window]])
        for index, path in enumerate(self.parts.layers):
            layer = self._layer(index, load_file(path), learned).module
            inputs = [self._slot(index, slot) for slot in range(len(windows))]
            outputs = [self._slot(index + 1, slot) for slot in range(len(windows))]
            self._through(layer, index, inputs, outputs)

    def _through(self, layer: nn.Module, index: int, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Run windows through a layer; an output may be the place of its own input."""
        mask = self._mask(index)

        def one(i: int) -> None:
            y = run_layer(layer, inputs[i].unsqueeze(0).to(self.device), self.positions, mask)
            outputs[i].copy_(y[0])

        for _ in self.workers.map(one, range(len(inputs))):
            pass

    def _backward(self, index: int, learned: Learned, gradients: dict[int, Tensor], rate: float) -> dict[int, Tensor]:
        """Learn what a layer has to learn; returns the gradients of its inputs by slot."""
        built = self._layer(index, load_file(self.parts.layers[index]), learned)
        parameters = [built.module.get_parameter(name).requires_grad_() for name in built.learnt]
        mask = self._mask(index)

        def one(slot: int) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                x = self._slot(index, slot).unsqueeze(0).to(self.device).requires_grad_()
                y = built.module(x, attention_mask=mask, position_embeddings=self.positions)
                return torch.autograd.grad(y, [x, *parameters], gradients[slot].unsqueeze(0))

        inputs: dict[int, Tensor] = {}
        totals: list[Tensor] | None = None
        for slot, (x_gradient, *found) in zip(gradients, self.workers.map(one, gradients), strict=True):
            inputs[slot] = x_gradient[0]
            totals = found if totals is None else [total.add_(part) for total, part in zip(totals, found, strict=True)]
        assert totals is not None
        for name, gradient in zip(built.learnt, totals, strict=True):
            target, chain = built.learnt[name]
            learned.update(target, chain(gradient).cpu(), rate)
        return inputs

    def _layer(self, index: int, tensors: Mapping[str, Tensor], learned: Learned) -> "_Built":
        """A decoder layer from its packed tensors and what was learnt."""
        prefix = f"{self.view.family.layers}.{index}."
        weights: dict[str, Tensor] = {}
        learnt: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {}
        for name, tensor in tensors.items():
            short = name.removeprefix(prefix)
            if name.endswith(".weight_scale"):
                module = name.removesuffix(".weight_scale")
                codes = centred_codes(tensors, module, self.parts.bits[module]).to(self.device)
                scale = tensor.float().to(self.device)
                weight = codes * (scale * self._factor(learned, name)).unsqueeze(-1)
                weights[short.removesuffix("_scale")] = weight.flatten(1)
                learnt[short.removesuffix("_scale")] = (name, _scale_chain(codes, scale))
            elif "weight_" not in short.rpartition(".")[2]:
                base = tensor.float().to(self.device)
                weights[short] = base * self._factor(learned, name)
                if name in learned.d:
                    learnt[short] = (name, base.mul)
        return _Built(self.view.build_layer(index, weights), learnt if learned.d else {})

    def _losses(
        self, learned: Learned, windows: list[int], gradient: bool
    ) -> list[tuple[float, Tensor | None, Tensor | None]]:
        gain = self.norm * self._factor(learned, self.norm_name)
        slots = range(len(windows))
        return list(self.workers.map(lambda slot: self._loss(slot, windows[slot], gain, gradient), slots))

    def _loss(self, slot: int, window: int, gain: Tensor, gradient: bool) -> tuple[float, Tensor | None, Tensor | None]:
        """KL of one window in nats a token, its gradients by the last hidden states and by the final norm's weight."""
        hidden = self._slot(self.view.num_layers, slot).to(self.device)
        with torch.set_grad_enabled(gradient):
            if gradient:
                hidden, gain = hidden.requires_grad_(), gain.detach().requires_grad_()
            normed = rms_norm(hidden, gain, self.view.config.rms_norm_eps)
        leaf = normed.detach().requires_grad_(gradient)
        back = torch.zeros_like(leaf)
        total = 0.0
        for start in range(0, len(leaf), HEAD_TOKENS):
            rows = slice(start, start + HEAD_TOKENS)
            target = F.log_softmax(self.targets[window][rows].to(self.device) @ self.dense_head.t(), -1)
            # d KL / d logits = p_quantized - p_dense
            logits = F.log_softmax(leaf.detach()[rows] @ self.head.t(), -1)
            chances = target.exp()
            total += float((chances * (target - logits)).sum())
            if gradient:
                back[rows] = (logits.exp_().sub_(chances)) @ self.head
        if not gradient:
            return total / len(leaf), None, None
        by_hidden, by_gain = torch.autograd.grad(normed, [hidden, gain], back / len(leaf))
        return total / len(leaf), by_hidden, by_gain

    def use(self, parts: Parts) -> None:
        """Take other files of the same model from now on, such as those with what was learnt."""
        self.parts = parts
        self.norm_name, self.norm = self._final_norm()

    def _final_norm(self) -> tuple[str, Tensor]:
        name, norm = next(iter(load_file(self.parts.norm).items()))
        return name, norm.float().to(self.device)

    def _slot(self, index: int, slot: int) -> Tensor:
        length = self.ids.shape[1]
        return self.hidden[index][slot * length : (slot + 1) * length]

    def _mask(self, index: int) -> Tensor | None:
        mask = self.view.attention_mask(index, self.ids.shape[1])
        return None if mask is None else mask.to(self.device)

    def _factor(self, learned: Learned, name: str) -> Tensor | float:
        factor = learned.factor(name)
        return factor.to(self.device) if isinstance(factor, Tensor) else factor


@dataclass
class _Built:
    """A layer, and for each parameter that is learnt its tensor's name and the way from ``dL/dW`` to ``dL/dd``."""

    module: nn.Module
    learnt: dict[str, tuple[str, Callable[[Tensor], Tensor]]]


def _scale_chain(codes: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    """``W = codes * s0 (1 + d)``, so ``dL/dd = s0 * sum over the group of dL/dW * codes``."""
    return lambda gradient: (gradient.view_as(codes) * codes).sum(-1) * scale


def rms_norm(hidden: Tensor, gain: Tensor, eps: float) -> Tensor:
    """``gain * x / sqrt(mean(x^2) + eps)`` over the last dimension, in the dtype of ``hidden``."""
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps) * gain
