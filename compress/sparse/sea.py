"""SEA's estimator (arXiv 2310.01777): attention of a layer, guessed at a fixed width in linear time, causally.

A performer (causal linear attention with random ReLU features, all values of a KV head shared by its query heads) sums
up what lies before a token; an encoder and a causal CNN make of it one row of W pixels for every query head, which
stretch over the keys that the token sees (`compress.sparse.sea_pixels`).

Rows may come in any portions: a state carries the performer's sums and the rows that the convolutions still look at, so
that the rows of a prompt, of its parts and of single new tokens are the same. It is O(1) in the tokens.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-3  # added to random features, so that no sum of them is zero
CHUNK = 128  # rows whose products with each other are held at once
DILATION = 2
TALL = 3  # rows and columns of a convolution's kernel
BEFORE = DILATION * (TALL - 1)  # earlier rows that a convolution looks at
LOOKED_AT = 2 * BEFORE  # rows whose queries decide, with all keys and values, on every later row
SHRUNK = 4  # pixels of the row that one pixel of the CNN stands for
OPEN = 6.0  # bias of the scaler's sigmoids at first: the sparse output as it is


@dataclass(frozen=True)
class Shape:
    """Of an estimator; all layers of a model have the same.

    Attributes:
        heads: query heads H.
        kv_heads: Hkv, which H is a multiple of.
        head_dim: D.
        length: tokens of the longest sequence.
        places: rows of the learned positions; over longer sequences they are stretched linearly.
        width: W, pixels of a row, a multiple of 4.
        divisor: random features are ``D ln D / divisor``.
        mixed: whether there is a scaler, which mixes the running mean of the values in.
    """

    heads: int
    kv_heads: int
    head_dim: int
    length: int
    places: int = 2048
    width: int = 256
    divisor: int = 8
    mixed: bool = False

    def __post_init__(self) -> None:
        if self.width < SHRUNK or self.width % SHRUNK:
            raise ValueError(f"width must be a multiple of {SHRUNK}, got {self.width}")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads don't divide into groups of {self.kv_heads} KV heads")
        for name in ("head_dim", "length", "places", "divisor"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def of(self, kv_heads: int) -> "Shape":
        """For so many KV heads of a layer, with the query heads of their groups."""
        return replace(self, heads=self.heads // self.kv_heads * kv_heads, kv_heads=kv_heads)

    @property
    def features(self) -> int:
        """Random features of a query or key."""
        return max(1, int(self.head_dim * math.log(self.head_dim) / self.divisor))

    @property
    def rows(self) -> int:
        """Rows of the table of positions."""
        return min(self.length, self.places)


@dataclass(frozen=True)
class State:
    """What the rows so far leave to the next.

    Attributes:
        tokens: so far ``[B]`` int64.
        sums: of the performer, products of features and values ``[B, Hkv, features, 2D + 1]`` float32.
        first: the newest rows before the first convolution ``[B, 2H, 4, W / 4]``; zeros where there are none.
        second: the same before the second.
        values: sum of the values ``[B, Hkv, D]`` float32.
    """

    tokens: Tensor
    sums: Tensor
    first: Tensor
    second: Tensor
    values: Tensor

    @classmethod
    def empty(cls, shape: Shape, batch: int, device: torch.device | None = None) -> "State":
        """Of sequences without tokens."""
        before = (batch, 2 * shape.heads, BEFORE, shape.width // SHRUNK)
        return cls(
            torch.zeros(batch, dtype=torch.int64, device=device),
            torch.zeros(batch, shape.kv_heads, shape.features, 2 * shape.head_dim + 1, device=device),
            torch.zeros(before, device=device),
            torch.zeros(before, device=device),
            torch.zeros(batch, shape.kv_heads, shape.head_dim, device=device),
        )

    @classmethod
    def together(cls, states: list["State"]) -> "State":
        """Of a batch whose sequences were treated one after another."""
        return cls(*(torch.cat(parts) for parts in zip(*(state.parts() for state in states), strict=True)))

    def select(self, sequences: Tensor) -> "State":
        """Of chosen sequences of the batch, integers ``[n]``, as beam search or a batch that shrinks needs them."""
        return State(*(part[sequences] for part in self.parts()))

    def parts(self) -> tuple[Tensor, ...]:
        """In the order of the attributes."""
        return self.tokens, self.sums, self.first, self.second, self.values


@dataclass(frozen=True)
class Rows:
    """What the estimator says about new rows.

    Attributes:
        logits: of compressed attention ``[B, H, n, W]`` float32.
        scales: s0 and s1 ``[B, H, n, 2]``, 0 to 1, or None without a scaler.
        mean: running mean of the values ``[B, Hkv, n, D]`` float32, or None likewise.
        state: after them.
    """

    logits: Tensor
    scales: Tensor | None
    mean: Tensor | None
    state: State

    def mix(self, out: Tensor) -> Tensor:
        """``s1 s0 o + (1 - s1) mean`` (eq. 9); the sparse output ``[B, H, n, D]`` as it is without a scaler."""
        if self.scales is None or self.mean is None:
            return out
        s0, s1 = self.scales.unbind(-1)
        mean = self.mean.repeat_interleave(out.shape[1] // self.mean.shape[1], 1)
        return ((s1 * s0)[..., None] * out + (1 - s1)[..., None] * mean).to(out.dtype)


class Estimator(nn.Module):
    """The estimator of one layer, causal variant.

    The last convolution is 1 x 1 and comes before the nearest upsampling rather than behind it, which is the same.
    Random features are drawn once: redrawn ones, as published, would want far longer training than a frozen model does.

    Args:
        shape: of the layer.
        seed: of the random features and of what is learnt.
    """

    directions: Tensor

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        heads, width, pixels = shape.heads, shape.head_dim, shape.width // SHRUNK
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("directions", orthogonal(shape.features, width, generator))
        self.positions = nn.Parameter(torch.empty(shape.rows, width))
        self.encoder, self.encoder_norm = nn.Linear(3 * width, 2 * width), nn.LayerNorm(2 * width)
        self.rows = nn.Linear(2 * width, 2 * pixels)
        self.rows_norm = nn.LayerNorm(pixels)
        self.first, self.second = (nn.Conv2d(2 * heads, 2 * heads, TALL, dilation=DILATION) for _ in range(2))
        self.last, self.last_norm = nn.Conv2d(2 * heads, heads, 1), nn.LayerNorm(shape.width)
        self.scaler = nn.Linear(2 * width, 2) if shape.mixed else None
        self._draw(generator)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, state: State | None = None, stretch: float = 1.0) -> Rows:
        """New rows of every sequence.

        Args:
            q: queries after rotary embedding ``[B, H, n, D]``, of any floating type; computed in float32.
            k: keys of the same tokens ``[B, Hkv, n, D]``.
            v: values ``[B, Hkv, n, D]``.
            state: of the tokens before them; None: there are none.
            stretch: factor of the tokens' positions, by which short sequences learn what long ones need.

        Raises:
            ValueError: other shapes, or more tokens than the estimator has positions for.
        """
        state = State.empty(self.shape, len(q), q.device) if state is None else state
        self._check(q, k, v, state, stretch)
        q, k, v = q.float(), k.float(), v.float()
        places = state.tokens[:, None] + torch.arange(q.shape[2], device=q.device)
        table = self._positions(places if stretch == 1 else places * stretch)[:, None].expand_as(v)
        grouped = self._features(q).unflatten(1, (self.shape.kv_heads, -1))
        ones = torch.ones_like(v[..., :1])
        found, sums = prefix_attention(grouped, self._features(k), torch.cat([table, v, ones], -1), state.sums)
        repeated = v.repeat_interleave(self.shape.heads // self.shape.kv_heads, 1)
        encoded = F.gelu(self.encoder_norm(self.encoder(torch.cat([found.flatten(1, 2), repeated], -1))))
        pixels = self.rows(encoded).unflatten(-1, (2, -1)).transpose(2, 3).flatten(1, 2)
        pixels, first = self._down(self.first, self.rows_norm(pixels), state.first)
        pixels, second = self._down(self.second, pixels, state.second)
        logits = self.last_norm(self.last(pixels).repeat_interleave(SHRUNK, -1))
        total = state.values[:, :, None] + v.cumsum(2)
        scales = mean = None
        if self.scaler is not None:
            scales, mean = self.scaler(encoded).sigmoid(), total / (places + 1)[:, None, :, None]
        after = State(state.tokens + q.shape[2], sums, first, second, total[:, :, -1].clone())
        return Rows(logits, scales, mean, after)

    def estimate(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Compressed attention of whole sequences ``[B, H, T, W]`` float32, rows sum to one (eq. 5); see `forward`."""
        logits: Tensor = self(q, k, v).logits
        return logits.softmax(-1)

    def resumed(self, q: Tensor, k: Tensor, v: Tensor) -> State:
        """The state after whole sequences of which only the last queries are known: at least `LOOKED_AT`, or all.

        Args:
            q: the last queries ``[B, H, n, D]``.
            k: keys of all T tokens ``[B, Hkv, T, D]``.
            v: values ``[B, Hkv, T, D]``.

        Raises:
            ValueError: fewer queries.
        """
        before = k.shape[2] - q.shape[2]
        if before and q.shape[2] < LOOKED_AT:
            raise ValueError(f"{q.shape[2]} queries of {k.shape[2]} tokens are known, wanted are {LOOKED_AT}")
        state = State.empty(self.shape, len(q), q.device)
        if before:
            keys, values = k[:, :, :before].float(), v[:, :, :before].float()
            places = torch.arange(before, device=q.device)[None].expand(len(q), -1)
            table = self._positions(places)[:, None].expand_as(values)
            x = torch.cat([table, values, torch.ones_like(values[..., :1])], -1)
            sums = self._features(keys).transpose(-1, -2) @ x
            state = replace(state, tokens=state.tokens + before, sums=sums, values=values.sum(2))
        after: State = self(q, k[:, :, before:], v[:, :, before:], state).state
        return after

    def _check(self, q: Tensor, k: Tensor, v: Tensor, state: State, stretch: float) -> None:
        shape, (batch, rows) = self.shape, (q.shape[0], q.shape[2])
        wanted = (batch, shape.kv_heads, rows, shape.head_dim)
        if q.shape != (batch, shape.heads, rows, shape.head_dim) or k.shape != wanted or v.shape != wanted or not rows:
            raise ValueError(
                f"queries {list(q.shape)}, keys {list(k.shape)} and values {list(v.shape)} don't fit an estimator of "
                f"{shape.heads} query and {shape.kv_heads} KV heads of {shape.head_dim}"
            )
        if len(state.tokens) != batch:
            raise ValueError(f"the state is of {len(state.tokens)} sequences, the queries of {batch}")
        most = math.ceil((int(state.tokens.max()) + rows - 1) * stretch) + 1
        if most > shape.length:
            raise ValueError(f"the estimator was made for at most {shape.length} tokens, got {most}")

    def _features(self, x: Tensor) -> Tensor:
        """The generalised kernel: ReLU of random projections, ``[..., n, D]`` to ``[..., n, features]``."""
        return F.relu(x @ self.directions.T * self.shape.head_dim**-0.25) + EPSILON

    def _positions(self, places: Tensor) -> Tensor:
        """Rows of the table, ``[B, n]`` to ``[B, n, D]``."""
        if self.shape.length == self.shape.rows and not places.is_floating_point():
            return self.positions[places]
        at = places * ((self.shape.rows - 1) / max(1, self.shape.length - 1))
        low = at.floor().long().clamp(max=self.shape.rows - 1)
        high = (low + 1).clamp(max=self.shape.rows - 1)
        return torch.lerp(self.positions[low], self.positions[high], (at - low)[..., None].float())

    def _down(self, convolution: nn.Conv2d, x: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """A convolution of each row with earlier ones, ReLU; and the newest rows, for those that come."""
        x = torch.cat([before, x], 2)
        return F.relu(convolution(F.pad(x, (DILATION, DILATION, 0, 0)))), x[:, :, -BEFORE:].clone()

    @torch.no_grad()
    def _draw(self, generator: torch.Generator) -> None:
        """What is learnt, at first: matrices by PyTorch's rule, from the generator."""
        self.positions.normal_(generator=generator)
        for module in (self.encoder, self.rows, self.first, self.second, self.last):
            bound = module.weight[0].numel() ** -0.5
            for parameter in module.parameters():
                parameter.uniform_(-bound, bound, generator=generator)
        if self.scaler is not None:
            self.scaler.weight.zero_()
            self.scaler.bias.fill_(OPEN)


def orthogonal(count: int, width: int, generator: torch.Generator) -> Tensor:
    """Orthogonal random directions ``[count, width]`` as long as normal vectors are (arXiv 2009.14794, section 2.4)."""
    blocks = []
    for _ in range(-(-count // width)):
        blocks.append(torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0].T)
    lengths = torch.randn(count, width, generator=generator, dtype=torch.float64).norm(dim=1, keepdim=True)
    return (torch.cat(blocks)[:count] * lengths).float()


def prefix_attention(fq: Tensor, fk: Tensor, x: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Causal linear attention in chunks: O(T) time and memory.

    Args:
        fq: features of the queries ``[B, Hkv, group, n, m]``.
        fk: features of the keys ``[B, Hkv, n, m]``.
        x: values with a last column of ones ``[B, Hkv, n, E + 1]``.
        sums: of feature times value over earlier tokens ``[B, Hkv, m, E + 1]``.

    Returns:
        Means of the values that are weighted by ``fq . fk`` ``[B, Hkv, group, n, E]``, and the new sums.
    """
    out = []
    for queries, keys, values in zip(fq.split(CHUNK, 3), fk.split(CHUNK, 2), x.split(CHUNK, 2), strict=True):
        near = (queries @ keys[:, :, None].transpose(-1, -2)).tril()
        out.append(near @ values[:, :, None] + queries @ sums[:, :, None])
        sums = sums + keys.transpose(-1, -2) @ values
    whole = torch.cat(out, 3)
    return whole[..., :-1] / whole[..., -1:], sums
