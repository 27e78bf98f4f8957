"""HiP: key blocks for a block of query rows, found by staged pruning of chunks (InfiniteHiP, arXiv 2502.08910).

Between the sink and the window lie chunks. Each stage scores the chunks that are left by a binary descent
(:func:`compress.kernels.chunk_scores.chunk_scores`), keeps the best and cuts them into smaller ones for the next stage;
the best of the last stage are the list. Chunks of a stage don't depend on each other, unlike the branches of the first
paper's tree (``hip_tree.py``), which is why this is the default.

While one token after the other is written, a stage's candidates stay good for a while: `HipState` keeps them, and a
search begins again at the first stage whose interval is over. What was newer than the candidates is in the window until
then, whose beginning stays where it was.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.kernels.block_attention import BlockList
from compress.kernels.chunk_scores import chunk_scores
from compress.sparse.found import Keys, Scores

QUERIES = 1 << 21  # bytes of pooled queries that are treated at once, over all KV heads
LEAST_KEPT = 4096  # tokens that a stage keeps of a prompt, however short it is
LEAST_OF_TOKEN = 2048  # the same for a new token, whose search is paid for again and again


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        chunk: slots of a chunk, a power of two.
        pool: consecutive query rows that are replaced by their mean.
        keep: tokens that the stage looks at, the best of the stage before; 0: all. Never more than that share of the
            length which `Stage.kept` says.
        share: of the length.
        refresh: steps of decoding after which it is done again.
    """

    chunk: int
    pool: int
    keep: int
    share: float
    refresh: int

    def kept(self, length: int, least: int = LEAST_KEPT) -> int:
        """Tokens that the stage looks at, ``least`` of them where its share of the length is less."""
        return length if self.keep == 0 else min(self.keep, max(least, int(self.share * length)))


STAGES = (Stage(256, 8, 0, 1.0, 32), Stage(32, 8, 32768, 1 / 4, 16), Stage(8, 8, 8192, 1 / 16, 8))


@dataclass(frozen=True)
class HipSettings:
    """How HiP searches.

    Attributes:
        k: tokens of a list.
        block_q: query rows that share a list.
        sink: first tokens, always seen.
        window: newest tokens, always seen.
        stages: from coarse to fine; the last one's chunk is the list's block.

    Raises:
        ValueError: chunks that aren't ever finer powers of two; a last chunk or pools that don't divide ``block_q``.
    """

    k: int = 1024
    block_q: int = 128
    sink: int = 128
    window: int = 1024
    stages: tuple[Stage, ...] = field(default=STAGES)

    def __post_init__(self) -> None:
        chunks = [stage.chunk for stage in self.stages]
        if not chunks or any(size < 2 or size & (size - 1) for size in chunks) or chunks != sorted(set(chunks))[::-1]:
            raise ValueError(f"stages must have ever smaller chunks, powers of two of at least 2, got {chunks}")
        for part in (self.block_k, *(stage.pool for stage in self.stages)):
            if self.block_q % part:
                raise ValueError(
                    f"block_q={self.block_q} isn't a multiple of {part}, a block of keys or a pool of rows"
                )
        if self.k < self.block_k or self.window < 1 or self.sink < 0:
            raise ValueError(f"k={self.k}, sink={self.sink}, window={self.window}: at least {self.block_k}, 0 and 1")

    @property
    def block_k(self) -> int:
        """Keys of a listed block."""
        return self.stages[-1].chunk


@dataclass
class HipState:
    """What a search leaves for the next step of decoding.

    Attributes:
        step: steps since the first search.
        candidates: of every stage after the first, the chunks it looks at, int32 ``[N, C]``.
        near: first slot of every sequence's window as of the first stage ``[B]``.
        blocks: the list, whose window reaches back to ``near``.
    """

    step: int
    candidates: list[Tensor]
    near: Tensor
    blocks: BlockList


def search(q: Tensor, k: Tensor, settings: HipSettings) -> BlockList:
    """Lists for the last R of T tokens, one for all query heads of a KV head.

    Args:
        q: queries after rotary embedding ``[B, H, R, D]``.
        k: keys after rotary embedding ``[B, Hkv, T, D]``.
        settings: how to search.

    Returns:
        Lists ``[B, Hkv, ceil(R / block_q), min(k, T) / block_k]`` of blocks between the sink and the first row's
        window, which reaches back to a block's end; of rows that see everything anyway, empty ones.
    """
    return _Search(q, k, settings, torch.full((len(q),), k.shape[2], device=q.device)).lists()


def due(step: int, settings: HipSettings) -> list[int]:
    """The stages whose interval is over at a step of decoding."""
    return [n for n, stage in enumerate(settings.stages) if step % stage.refresh == 0]


def refreshed(q: Tensor, k: Tensor | Keys, settings: HipSettings, state: HipState | None, ends: Tensor) -> HipState:
    """The list for one new token of every sequence, searched for from the first stage on whose interval is over.

    Args:
        q: queries ``[B, H, 1, D]``.
        k: keys ``[B, Hkv, T, D]``, the new token's among them; every sequence begins at slot 0.
        settings: how to search.
        state: what the former token's search left, with a stage that is due; None: search everywhere.
        ends: ``[B]``, one past each sequence's last slot.
    """
    return _Search(q, k, settings, ends).continued(state)


class _Search:
    """One search; N counts sequences, KV heads and blocks of rows."""

    def __init__(self, q: Tensor, k: Tensor | Keys, settings: HipSettings, ends: Tensor) -> None:
        self.settings = settings
        (self.batch, heads, self.rows, self.width), (_, self.kv_heads, self.length, _) = q.shape, k.shape
        self.blocks = -(-self.rows // settings.block_q)
        self.least = LEAST_KEPT if self.rows > 1 else LEAST_OF_TOKEN
        device = q.device
        self.place = ends[:, None] - self.rows + torch.arange(self.blocks, device=device) * settings.block_q
        # One past the last slot that a list may name, the end of a whole block: what follows is in the window.
        far = (self.place - settings.window + 1).int()
        self.slack = (far - settings.sink) % settings.block_k  # alike for all blocks of rows
        self.far = far - self.slack
        self.device = device
        self.scores = _scores(k) if isinstance(k, Tensor) else k.scores
        self.base = torch.arange(self.batch * self.kv_heads, device=device).int() * self.length
        padding = self.blocks * settings.block_q - self.rows
        queries = q.unflatten(1, (self.kv_heads, heads // self.kv_heads))
        if padding and self.rows > 1:
            queries = torch.cat([queries, queries[..., -1:, :].expand(-1, -1, -1, padding, -1)], 3)
        self.queries = queries  # [B, Hkv, group, rows, D]

    def lists(self) -> BlockList:
        """Of all blocks of rows, some at a time."""
        settings = self.settings
        most = max(1, min(settings.k, self.length) // settings.block_k)
        starts = torch.zeros(self.batch, self.kv_heads, self.blocks, most, dtype=torch.int32, device=self.device)
        counts = torch.zeros(starts.shape[:3], dtype=torch.int32, device=starts.device)
        row = self.queries.shape[2] * settings.block_q * self.width * self.queries.element_size()
        size = max(1, QUERIES // max(1, row * self.kv_heads * self.batch))
        for begin in range(0, self.blocks, size):
            some = slice(begin, min(begin + size, self.blocks))
            found, number = self._found(some, self._first(some), self.settings.stages)
            shape = (self.batch, self.kv_heads, some.stop - some.start)
            wide = min(most, found.shape[1])
            starts[:, :, some, :wide] = found[:, :wide].view(*shape, -1)
            counts[:, :, some] = number.view(shape)
        return self._list(starts, counts, settings.window + (int(self.slack[0, 0]) if self.slack.numel() else 0))

    def continued(self, state: HipState | None) -> HipState:
        """The next state of decoding."""
        stages, some = self.settings.stages, slice(0, 1)
        step = 0 if state is None else state.step + 1
        begin = 0 if state is None else due(step, self.settings)[0]
        candidates = [] if state is None else state.candidates[:begin]
        near = self.far[:, 0].clamp(min=0) if begin == 0 else _present(state).near
        self.far = near[:, None].int()
        chunks = self._first(some) if begin == 0 else candidates[begin - 1]
        kept = list(candidates)
        found, number = self._found(some, chunks, stages[begin:], kept)
        starts = found.view(self.batch, self.kv_heads, 1, -1)
        blocks = self._list(starts, number.view(self.batch, self.kv_heads, 1), self._window(near))
        return HipState(step, kept, near, blocks)

    def _window(self, near: Tensor) -> int:
        """From the newest token back to where the window began when candidates were last looked for everywhere."""
        return max(self.settings.window, int((self.place[:, 0] - near + 1).max()))

    def _list(self, starts: Tensor, counts: Tensor, window: int) -> BlockList:
        settings = self.settings
        return BlockList(starts, counts, settings.block_q, settings.block_k, settings.sink, window)

    def _first(self, some: slice) -> Tensor:
        """The first stage's chunks, all that there are, int32 [N, C]; -1 for none."""
        chunk = self.settings.stages[0].chunk
        reach = int(self.far[:, some].max()) if self.far[:, some].numel() else 0
        sink = self.settings.sink
        grid = torch.arange(sink, max(sink, reach), chunk, device=self.device, dtype=torch.int32)
        starts = grid.expand(self.batch, self.kv_heads, some.stop - some.start, -1)
        whole = chunk if len(self.settings.stages) == 1 else 1
        return self._allowed(starts.flatten(0, 2), some, whole)

    def _found(
        self, some: slice, chunks: Tensor, stages: tuple[Stage, ...], kept: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The list of some blocks of rows, int32 [N, <= k / block_k] ascending, and its lengths [N].

        Args:
            some: blocks of rows.
            chunks: what the first of the stages looks at.
            stages: which are left.
            kept: takes what the later ones look at.
        """
        for stage, following in zip(stages, (*stages[1:], None), strict=True):
            wanted = self.settings.k if following is None else following.kept(self.length, self.least)
            chunks = self._best(some, chunks, stage, wanted // stage.chunk)
            if following is None:
                break
            parts = torch.arange(0, stage.chunk, following.chunk, device=chunks.device, dtype=torch.int32)
            chunks = torch.where(chunks[..., None] < 0, -1, chunks[..., None] + parts).flatten(1)
            # Of the last stage's chunks, which are the list's blocks, all slots have to lie before the window.
            chunks = self._allowed(chunks, some, whole=following.chunk if following is stages[-1] else 1)
            if kept is not None:
                kept.append(chunks)
        there = chunks >= 0
        order = (~there).to(torch.int8).argsort(dim=1, stable=True)
        return chunks.gather(1, order), there.sum(1).int()

    def _best(self, some: slice, chunks: Tensor, stage: Stage, count: int) -> Tensor:
        """The best chunks, ascending, -1 for none; all of them, unscored, where there aren't more."""
        if chunks.shape[1] <= count:
            return chunks
        ends = self._ends(some)
        scores = self.scores(self._pooled(some, stage.pool), self._bases(some), chunks, ends, stage.chunk)
        best = scores.topk(count, dim=1).indices.sort(dim=1).values
        return chunks.gather(1, best)

    def _pooled(self, some: slice, pool: int) -> Tensor:
        """Means of consecutive query rows [N, group * rows / pool, D]."""
        size = self.settings.block_q
        queries = self.queries
        if self.rows > 1:
            queries = queries[..., some.start * size : some.stop * size, :]
            queries = queries.unflatten(3, (some.stop - some.start, size // pool, pool)).mean(5)
        else:
            queries = queries.unsqueeze(3)
        return queries.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(0, 2)

    def _bases(self, some: slice) -> Tensor:
        return self.base.repeat_interleave(some.stop - some.start)

    def _ends(self, some: slice) -> Tensor:
        """One past the last slot that may be listed, [N] int32."""
        return self.far[:, None, some].expand(-1, self.kv_heads, -1).reshape(-1)

    def _allowed(self, chunks: Tensor, some: slice, whole: int) -> Tensor:
        """Chunks of which at least ``whole`` slots may be listed; -1 for the others."""
        return chunks.masked_fill(chunks + whole > self._ends(some)[:, None], -1)


def _scores(k: Tensor) -> Scores:
    """Of chunks of keys [B, Hkv, T, D]."""
    keys = k.contiguous().view(-1, k.shape[3])

    def scores(q: Tensor, base: Tensor, starts: Tensor, ends: Tensor, chunk: int) -> Tensor:
        return chunk_scores(q, keys, base, starts, ends, chunk)

    return scores


def _present(state: HipState | None) -> HipState:
    assert state is not None
    return state
