"""Log-probabilities of given tokens at given places, with the language-model head applied only there."""

from collections.abc import Sequence
from typing import Any

import torch
from compress.evalsuite.head import Decoder, chunk_tokens, logits_in_chunks

Answer = tuple[float, bool]
"""Log-likelihood of a continuation in nats, and whether greedy decoding would have produced it."""

Wanted = tuple[Sequence[int], Sequence[int]]
"""Places among all tokens of a batch, flattened, and the tokens to be predicted there."""


class TokenLogits:
    """A causal language model that is asked for single tokens.

    Args:
        model: a transformers causal language model.
        sample: a few token ids, to see whether its head can be applied on its own.
    """

    def __init__(self, model: Any, sample: Sequence[int]) -> None:
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        self._decoder = Decoder(model, self.ids([sample]))
        self._chunk = chunk_tokens(self._decoder.vocabulary, 2)

    def ids(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Rows of equal length as ``[batch, seq]`` ids where the model wants them."""
        return torch.tensor(rows, dtype=torch.long, device=self.device)

    def answers(self, wanted: Sequence[Wanted], **inputs: Any) -> list[Answer]:
        """Score continuations in one forward pass.

        Args:
            wanted: for each continuation the places whose logits predict it, and its tokens.
            inputs: what the model is called with.
        """
        places = torch.tensor([place for where, _ in wanted for place in where], device=self.device)
        targets = torch.tensor([token for _, tokens in wanted for token in tokens], device=self.device)
        places, where = places.unique(return_inverse=True)
        found = torch.zeros(len(targets), dtype=torch.float64, device=self.device)
        greedy = torch.zeros(len(targets), dtype=torch.bool, device=self.device)
        states = self._decoder.states(**inputs).flatten(0, 1)[places]
        start = 0
        for part in logits_in_chunks(self._decoder.head, states, self._chunk):
            logits = part.to(self.device)
            here = (where >= start) & (where < start + len(logits))
            rows, tokens = where[here] - start, targets[here]
            found[here] = logits.float().log_softmax(-1)[rows, tokens].double()
            greedy[here] = logits.argmax(-1)[rows] == tokens
            start += len(logits)
        sizes = [len(tokens) for _, tokens in wanted]
        return [
            (float(values.sum()), bool(hits.all()))
            for values, hits in zip(found.cpu().split(sizes), greedy.cpu().split(sizes), strict=True)
        ]
