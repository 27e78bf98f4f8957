"""Random tokens, repeated: whoever attends to what followed a token's earlier copies copies from far back.

Nothing in such a text but its earlier copies tells what comes next, so that the heads that find them, echo and
induction heads (RazorAttention, arXiv 2407.15891, section 3.2; arXiv 2209.11895), show with no data at all.
"""

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from compress.evalsuite.longcontext.prompts import token_ids
from compress.heads.rows import probabilities
from compress.tap import Seen


@dataclass(frozen=True)
class Copies:
    """A sequence of random tokens, several times.

    Attributes:
        ids: [T] int64.
        first: tokens before it, which the tokenizer puts there.
        period: tokens of one copy.
        count: of copies.
    """

    ids: Tensor
    first: int
    period: int
    count: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, vocabulary: int, length: int, count: int, seed: int) -> "Copies":
        """Random tokens that aren't special ones, at most ``length`` of all copies together.

        Args:
            tokenizer: of the model.
            vocabulary: rows of its embedding.
            length: tokens.
            count: of copies.
            seed: of the draw.
        """
        first, special = token_ids(tokenizer, ""), set(tokenizer.all_special_ids)
        ordinary = [token for token in range(min(len(tokenizer), vocabulary)) if token not in special]
        period = (length - len(first)) // count
        ids = first + Random(seed).choices(ordinary, k=period) * count
        return cls(torch.tensor(ids), len(first), period, count)

    def mass(self, seen: Seen, ahead: int) -> Tensor:
        """Attention of the second copy's rows, and of later ones, to what is ``ahead`` of their tokens' earlier copies.

        Args:
            seen: attention of one layer over ``ids``.
            ahead: 0 for the copies themselves (echo), 1 for what followed them (induction).

        Returns:
            Mean mass of a row, [heads], 0 to 1.
        """
        rows = torch.arange(self.first + self.period, len(self.ids))
        found = torch.zeros(seen.query.shape[1], device=seen.key.device)
        for own, mass in probabilities(seen, rows):
            own = own.to(mass.device)
            places = own[:, None] - self.period * torch.arange(1, self.count, device=own.device)
            at = (places + ahead).clamp(min=0).expand(len(mass), -1, -1)
            found += (mass.gather(2, at) * (places >= self.first)).sum((1, 2))
        return found / len(rows)
