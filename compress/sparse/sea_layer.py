"""One layer's estimator of SEA: what it learns from the layer's own attention, and how well it does.

The estimate, stretched over the keys, is held against attention on sampled rows; the estimator itself runs over all
rows, since its convolutions look at earlier ones. The scaler learns behind it, from outputs.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.heads.layers import Layers
from compress.kernels.block_attention import block_attention
from compress.sparse.sea import Estimator, Shape
from compress.sparse.sea_learn import Learning, Pace, learn
from compress.sparse.sea_mask import Budget, prompt
from compress.sparse.sea_pixels import compress, resize
from compress.tap import Seen

JITTERED = 0.1  # part of the steps in which keys read pixels beside their own
JITTER = 0.75  # keys, at most
FLOOR = 1e-9  # of mass over share in a map of known attention
PHASES = ("map", "mix")


@dataclass(frozen=True)
class FitSettings:
    """How a layer is fitted.

    Attributes:
        map: how the estimator learns.
        mix: how the scaler learns, if the shape has one.
        budget: of the lists by which the scaler learns.
        rows: sampled of a sequence.
        held_out: sequences, the last, that aren't learnt from; what is reported is theirs.
        seed: of everything random.
    """

    map: Pace = field(default_factory=Pace)
    mix: Pace = field(default_factory=lambda: Pace(steps=100, rate=1e-2, every=25))
    budget: Budget = field(default_factory=Budget)
    rows: int = 128
    held_out: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Figures:
    """Of a layer, on held-out sequences.

    Attributes:
        mean_map: KL divergence, nats a row, of one map for all rows: what a head's attention is on average.
        grid: of the layer's own attention, averaged within pixels: what no estimator gets below.
        before: that of the estimator before it learnt.
        after: that of the estimator that is kept.
        steps: that the estimator learnt.
        diverged: 1 if it stopped for that, else 0.
        sparse: squared error of the sparse output relative to the dense one, unmixed; nan if nothing was mixed.
        mixed: of the mixed one.
    """

    mean_map: float
    grid: float
    before: float
    after: float
    steps: float
    diverged: float
    sparse: float = math.nan
    mixed: float = math.nan

    @classmethod
    def of(cls, learnings: Mapping[str, Learning], bounds: tuple[float, float]) -> "Figures":
        """From what was learnt, by phase, and from `LayerFit.bounds`."""
        mapped, mixed = learnings["map"], learnings.get("mix")
        return cls(
            mean_map=bounds[0],
            grid=bounds[1],
            before=mapped.before,
            after=mapped.lowest,
            steps=float(mapped.step),
            diverged=float(mapped.diverged),
            sparse=math.nan if mixed is None else mixed.before,
            mixed=math.nan if mixed is None else mixed.lowest,
        )


class LayerFit:
    """One layer.

    Args:
        layers: of the model, within `Layers.tapped`.
        hidden: its input, ``[1, T, hidden]`` of every sequence.
        index: its number.
        shape: of the estimator.
        settings: see there.
        heads: the KV heads that it is for; None: all.
    """

    def __init__(
        self,
        layers: Layers,
        hidden: Sequence[Tensor],
        index: int,
        shape: Shape,
        settings: FitSettings,
        heads: Sequence[int] | None = None,
    ) -> None:
        self.layers, self.hidden, self.index, self.settings, self.heads = layers, hidden, index, settings, heads
        self.estimator = Estimator(shape, settings.seed * 1000 + index).to(layers.device)
        self._seen: dict[int, Seen] = {}
        self.longest = max(1.0, (shape.length - 1) / max(1, hidden[0].shape[1] - 1))
        self.positions = layers.positions(hidden[0])
        count = len(hidden) - settings.held_out
        self.learnt, self.held = range(count), range(count, len(hidden))

    def learn(self, phase: str, start: Learning | None) -> Iterator[Learning]:
        """One of `phases`, or what is left of it; see `compress.sparse.sea_learn.learn`."""
        mixing = phase == "mix"
        own = {name: p for name, p in self.estimator.named_parameters() if name.startswith("scaler.") == mixing}
        for parameter in self.estimator.parameters():
            parameter.requires_grad_(any(parameter is other for other in own.values()))
        if phase == "map":
            return learn(own, self.map_loss, self.divergence, self.settings.map, start)
        return learn(own, self.mix_loss, self.mix_error, self.settings.mix, start)

    @property
    def phases(self) -> tuple[str, ...]:
        """What there is to learn, in this order."""
        return PHASES if self.estimator.scaler is not None else PHASES[:1]

    def tensors(self) -> dict[str, Tensor]:
        """The estimator as it is, on the CPU."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self.estimator.state_dict().items()}

    def map_loss(self, step: int) -> Tensor:
        """Of one sequence."""
        generator = torch.Generator().manual_seed((self.settings.seed * 1000 + self.index) * 1_000_000 + step)
        seen = self.read(_place(step, len(self.learnt), self.settings.seed))
        length = seen.query.shape[2]
        rows = torch.randperm(length, generator=generator)[: self.settings.rows].sort().values
        jitter = None
        if float(torch.rand((), generator=generator)) < JITTERED:
            drawn = torch.rand(len(rows), length, generator=generator)
            jitter = ((2 * drawn - 1) * JITTER).to(seen.query.device)
        rows = rows.to(seen.query.device)
        stretch = 1 + float(torch.rand((), generator=generator)) * (self.longest - 1)
        logits = self.estimator(seen.query, seen.key, seen.value, stretch=stretch).logits[:, :, rows]
        estimate, attention = resize(logits, rows + 1, length, jitter), teacher(seen, rows)
        return divergence(attention, estimate) + (attention - estimate.exp()).square().sum(-1).mean()

    @torch.no_grad()
    def divergence(self) -> float:
        """KL of the held-out sequences, from the first, as it is, to the last, stretched to the estimator's length."""
        stretches = iter(torch.linspace(1, self.longest, len(self.held)).tolist())

        def guess(seen: Seen, rows: Tensor) -> Tensor:
            logits: Tensor = self.estimator(seen.query, seen.key, seen.value, stretch=next(stretches)).logits
            return logits[:, :, rows]

        return self._held(guess)

    @torch.no_grad()
    def bounds(self) -> tuple[float, float]:
        """KL of the held-out sequences that `Figures` calls ``mean_map`` and ``grid``."""
        mass = share = torch.zeros((), device=self.layers.device)
        width = self.estimator.shape.width
        for index in self.learnt:
            seen = self.read(index)
            rows = self._even(seen)
            found = compress(teacher(seen, rows), rows + 1, width)
            mass, share = mass + found[0].sum(2), share + found[1].sum(0)
        mean = _density(mass, share)[:, :, None]

        def own(seen: Seen, rows: Tensor) -> Tensor:
            return _density(*compress(teacher(seen, rows), rows + 1, width))

        return self._held(lambda seen, rows: mean.expand(-1, -1, len(rows), -1)), self._held(own)

    def mix_loss(self, step: int) -> Tensor:
        """Error of the mixed output of one sequence."""
        return self._error(self.read(_place(step, len(self.learnt), self.settings.seed)))

    @torch.no_grad()
    def mix_error(self) -> float:
        """Of the held-out sequences."""
        return sum(float(self._error(self.read(index))) for index in self.held) / len(self.held)

    @torch.no_grad()
    def read(self, index: int) -> Seen:
        """Queries, keys and values of a sequence, held from the first time on."""
        if index in self._seen:
            return self._seen[index]
        shown: list[Seen] = []

        def see(seen: Seen) -> Tensor:
            shown.append(seen)
            return seen.query.transpose(1, 2)  # nobody wants this layer's output

        self.layers.run(self.index, self.hidden[index], self.positions, see)
        self._seen[index] = found = shown[0] if self.heads is None else shown[0].of(self.heads)
        return found

    def _error(self, seen: Seen) -> Tensor:
        q, k, v = seen.query, seen.key, seen.value
        with torch.no_grad():
            blocks = prompt(self.estimator, q, k, v, self.settings.budget).blocks
            sparse, dense = block_attention(q, k, v, blocks, seen.scaling)[0], seen.attend().transpose(1, 2)
        mixed = self.estimator(q, k, v).mix(sparse)
        return (mixed - dense).square().sum() / dense.square().sum()

    def _held(self, guess: Callable[[Seen, Tensor], Tensor]) -> float:
        """Mean KL of guesses ``[1, H, R, W]`` on rows of the held-out sequences that are the same every time."""
        total = 0.0
        for index in self.held:
            seen = self.read(index)
            rows = self._even(seen)
            estimate = resize(guess(seen, rows), rows + 1, seen.query.shape[2])
            total += float(divergence(teacher(seen, rows), estimate))
        return total / len(self.held)

    def _even(self, seen: Seen) -> Tensor:
        """Rows of a sequence, evenly spaced, the last among them."""
        length = seen.query.shape[2]
        count = min(self.settings.rows, length)
        return torch.arange(1, count + 1, device=seen.query.device) * length // count - 1


def _density(mass: Tensor, share: Tensor) -> Tensor:
    """Logits of pixels, from their mass and their share of the keys; a pixel without keys has any."""
    return (mass / share.clamp(min=torch.finfo().tiny)).clamp(min=FLOOR).log()


def teacher(seen: Seen, rows: Tensor) -> Tensor:
    """A layer's own causal attention, ``[1, H, R, T]`` float32, of rows ``[R]`` of whole sequences."""
    query = seen.query[:, :, rows].float().unflatten(1, (seen.key.shape[1], -1))
    scores = query @ seen.key.float()[:, :, None].transpose(-1, -2) * seen.scaling
    later = torch.arange(scores.shape[-1], device=rows.device) > rows[:, None]
    return scores.masked_fill(later, -torch.inf).softmax(-1).flatten(1, 2)


def divergence(attention: Tensor, estimate: Tensor) -> Tensor:
    """KL divergence in nats, mean over rows and heads.

    Args:
        attention: probabilities ``[B, H, R, T]``.
        estimate: log-probabilities ``[B, H, R, T]``.
    """
    cross = attention * estimate.masked_fill(attention == 0, 0)
    return (torch.xlogy(attention, attention) - cross).sum(-1).mean()


def _place(step: int, sequences: int, seed: int) -> int:
    """The sequence of a step: every epoch goes through all of them in an order of its own."""
    epoch, place = divmod(step, sequences)
    generator = torch.Generator().manual_seed(seed * 1000 + epoch)
    return int(torch.randperm(sequences, generator=generator)[place])
