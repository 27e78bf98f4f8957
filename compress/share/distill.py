"""EchoAtt's distillation (arXiv 2409.14595): a student that shares attention learns from the model that it was made of.

In the first stage, for every token, with s the student and t the teacher,

    L = hidden * mean over layers |h_s - h_t|^2 / |h_t|^2
      + soft * T^2 KL(softmax(z_t / T) || softmax(z_s / T))  -  hard * log softmax(z_s)[argmax z_t]

where layers are those that take their attention from another one, and the last norm; in the second stage only the
text's own next tokens count. The paper names the three losses, not their weights; a hidden state is measured by its own
length here, since that of the first token is a hundred times that of others. Logits z are made for a few tokens at a
time, of both models, and their gradient is taken at once: it is a difference of probabilities.

Layers before the first that can differ aren't run a second time: the student goes on from the teacher's hidden states.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.fingerprint import sliding_layers
from compress.share.modules import Consumer

CHUNK = 64  # tokens whose logits are in memory at once


class Terms(NamedTuple):
    """Weights of the losses, and the temperature of the soft labels."""

    hidden: float = 0.0
    soft: float = 0.0
    hard: float = 0.0
    next: float = 0.0
    temperature: float = 1.0


@dataclass(frozen=True)
class Passed:
    """What a model made of windows.

    Attributes:
        states: inputs of layers by their numbers, [batch, T, hidden]; the last layer's output stands behind them.
        last: behind the last norm.
    """

    states: dict[int, Tensor]
    last: Tensor


class Decoder:
    """A model of one of our families, run from any layer on.

    Args:
        model: with a language head.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model: Any = model
        self._base: Any = model.base_model
        self.config = model.config.get_text_config(decoder=True)
        self.count = int(self.config.num_hidden_layers)
        self._sliding = set(sliding_layers(self.config))
        self._echoes = [module.echo for module in self._base.modules() if isinstance(module, Consumer)]

    @property
    def head(self) -> Tensor:
        """The output head [vocabulary, hidden]."""
        weight: Tensor = self._model.get_output_embeddings().weight
        return weight

    def embed(self, ids: Tensor) -> Tensor:
        """The residual stream before the first layer, [batch, T, hidden], of tokens [batch, T]."""
        embedded: Tensor = self._model.get_input_embeddings()(ids)
        return embedded

    def run(self, hidden: Tensor, first: int, kept: Collection[int]) -> Passed:
        """From the input of layer ``first`` to the last norm; the inputs of layers ``kept`` are handed back."""
        places = torch.arange(hidden.shape[1], device=hidden.device)[None]
        positions = self._base.rotary_emb(hidden, places)
        states: dict[int, Tensor] = {}
        for index in range(first, self.count):
            if index in kept:
                states[index] = hidden
            hidden = self._base.layers[index](
                hidden, attention_mask=self._mask(index, hidden), position_embeddings=positions
            )
        if self.count in kept:
            states[self.count] = hidden
        for echo in self._echoes:  # the whole model's own forward would do it
            echo.clear()
        return Passed(states, self._base.norm(hidden))

    def _mask(self, index: int, hidden: Tensor) -> Tensor | None:
        """As :meth:`compress.model.ModelView.attention_mask`."""
        length = hidden.shape[1]
        if index not in self._sliding or self.config.sliding_window >= length:
            return None
        place = torch.arange(length, device=hidden.device)
        distance = place[:, None] - place[None, :]
        return ((distance >= 0) & (distance < self.config.sliding_window))[None, None]


class Pair(nn.Module):
    """Teacher and student on the same windows; only the student's parameters are the module's.

    Args:
        student: shares attention; its trained parameters require gradients, the others don't.
        teacher: the dense model.
        first: layer before which the two are the same, and stay so.
        compared: layers whose outputs are held against the teacher's.
        dtype: in which the two multiply, beside float32 parameters.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        first: int,
        compared: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.student: Any = student
        self._decoders = Decoder(student), Decoder(teacher)
        self._first, self._kept, self._dtype = first, {layer + 1 for layer in compared}, dtype

    def forward(self, ids: Tensor, terms: Terms) -> Tensor:
        """The losses of windows, [5]: in all, hidden, soft, hard and next, each a mean over tokens, not weighted.

        Args:
            ids: [batch, T].
            terms: weights; what has none isn't computed, and is 0.
        """
        learner, teacher = self._decoders
        with torch.autocast(ids.device.type, self._dtype, enabled=self._dtype != torch.float32):
            with torch.no_grad():
                begun = teacher.embed(ids)
                taught = teacher.run(begun, 0, {*self._kept, self._first})
            start = taught.states[self._first] if self._first else learner.embed(ids)
            found = learner.run(start, self._first, self._kept)
        zero = torch.zeros((), device=ids.device)
        hidden = self._hidden_loss(found, taught) if terms.hidden else zero
        targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -1)], dim=1).flatten()
        known = Known(_rows(taught.last, self._dtype), teacher.head.to(self._dtype), targets, terms)
        judged, parts = _Vocabulary.apply(_rows(found.last, self._dtype), learner.head, known)
        return torch.cat([(terms.hidden * hidden + judged)[None], hidden.detach()[None], parts])

    @torch.no_grad()
    def judge(self, ids: Tensor) -> Tensor:
        """KL from the teacher at temperature 1, and the text's next-token loss: [2], means over tokens in nats."""
        parts = self(ids, Terms(soft=1.0, next=1.0))
        return parts[[2, 4]]

    def _hidden_loss(self, found: Passed, taught: Passed) -> Tensor:
        """Squared error of hidden states by the teacher's squared length: mean over tokens and layers."""
        pairs = [(found.last, taught.last)]
        pairs += [(found.states[place], taught.states[place]) for place in sorted(self._kept) if place in found.states]
        losses = [
            ((ours.float() - theirs.float()).square().sum(-1) / theirs.float().square().sum(-1)).mean()
            for ours, theirs in pairs
        ]
        return torch.stack(losses).mean()


@dataclass(frozen=True)
class Known:
    """What the losses over the vocabulary compare with.

    Attributes:
        last: the teacher's states behind the last norm, [tokens, hidden].
        head: the teacher's [vocabulary, hidden], in the same dtype.
        targets: the text's next tokens [tokens], -1 where there is none.
        terms: weights.
    """

    last: Tensor
    head: Tensor
    targets: Tensor
    terms: Terms


class _Vocabulary(torch.autograd.Function):
    """Losses of a few tokens after the other, their gradients found on the way."""

    @staticmethod
    def forward(ctx: Any, last: Tensor, head: Tensor, known: Known) -> tuple[Tensor, Tensor]:
        """The weighted loss [] and its parts [3]: soft, hard, next.

        Args:
            ctx: PyTorch's.
            last: the student's states behind the last norm, [tokens, hidden].
            head: the student's, float32 [vocabulary, hidden].
            known: see there.
        """
        weight = head.to(last.dtype)
        by_last = torch.zeros_like(last) if ctx.needs_input_grad[0] else None
        by_head = torch.zeros_like(head) if ctx.needs_input_grad[1] else None
        counts = torch.tensor([len(last), len(last), int((known.targets >= 0).sum())], device=last.device)
        scales = torch.tensor(known.terms[1:4], device=last.device) / counts
        sums = torch.zeros(3, device=last.device)
        for start in range(0, len(last), CHUNK):
            rows = slice(start, start + CHUNK)
            logits, theirs = (last[rows] @ weight.t()).float(), (known.last[rows] @ known.head.t()).float()
            found, gradient = _logit_losses(logits, theirs, known.targets[rows], known.terms, scales)
            sums += found
            if by_last is not None:
                by_last[rows] = gradient.to(weight.dtype) @ weight
            if by_head is not None:
                by_head += (gradient.to(weight.dtype).t() @ last[rows]).float()
        ctx.save_for_backward(*(gradient for gradient in (by_last, by_head) if gradient is not None))
        parts = sums / counts
        ctx.mark_non_differentiable(parts)
        return (sums * scales).sum(), parts

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Of the weighted loss."""
        saved = list(ctx.saved_tensors)
        gradients = [upstream.to(saved[0].dtype) * saved.pop(0) if need else None for need in ctx.needs_input_grad[:2]]
        return gradients[0], gradients[1], None


def _logit_losses(
    logits: Tensor, theirs: Tensor, targets: Tensor, terms: Terms, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums of the three losses over tokens, and the gradient of the weighted sum by the student's logits.

    Args:
        logits: float32 [tokens, vocabulary].
        theirs: the teacher's.
        targets: next tokens, -1 for none.
        terms: what has a weight is computed.
        scales: of the sums in what is differentiated, [3].
    """
    sums, gradient = torch.zeros(3, device=logits.device), torch.zeros_like(logits)
    if terms.soft:
        warm = terms.temperature
        wanted, their_sum = _softmax(theirs / warm)
        ours, our_sum = _softmax(logits / warm)
        gap = torch.linalg.vecdot(wanted, theirs - logits) / warm
        sums[0] = warm**2 * (gap - their_sum + our_sum).sum()
        gradient.add_(ours.sub_(wanted), alpha=float(scales[0]) * warm)
    labels = {1: theirs.argmax(-1)} if terms.hard else {}
    if terms.next:
        labels[2] = targets
    if labels:
        ours, our_sum = _softmax(logits)
    for place, label in labels.items():
        there, picked = (label >= 0).float(), label.clamp(min=0)[:, None]
        sums[place] = ((our_sum - logits.gather(1, picked)[:, 0]) * there).sum()
        slope = there * scales[place]
        gradient.addcmul_(ours, slope[:, None])
        gradient.scatter_add_(1, picked, -slope[:, None])
    return sums, gradient


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities, and the logarithms of the sums they were divided by; cheaper than ``exp`` of ``log_softmax``."""
    chances = torch.softmax(logits, -1)
    return chances, logits.amax(-1) - chances.amax(-1).log()


def _rows(last: Tensor, dtype: torch.dtype) -> Tensor:
    """States of all windows after each other."""
    return last.flatten(0, 1).to(dtype)
