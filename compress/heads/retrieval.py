"""The retrieval score (Wu et al., arXiv 2404.15574, section 2): heads that copy a needle while the model answers.

At every token that the model says, a head scores if the key that it looks at most stands in the needle and is the token
said. A needle's hits are divided by its length. Most heads score 0, so the middle of the ranking says nothing.

Unlike there, the first tokens of a needle are given with the question: small models would rather say something else.
"""

import copy
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from compress.calibrate.decoding import cache_for
from compress.calibrate.errors import InputError
from compress.evalsuite.head import evaluating
from compress.generation.completion import end_tokens
from compress.heads.data import CHUNK, Asked, Item
from compress.heads.layers import Layers
from compress.heads.rows import by_kv_head
from compress.tap import Seen

GIVEN = 2
"""Tokens of a needle that stand in the question."""

RECALL = 0.5
"""Share of a needle's words that an answer must hold for its heads to count (ROUGE-1 recall)."""


def retrieval_scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> Tensor:
    """The score of every KV head, the largest of its query heads.

    A prompt goes through the model's own attention once; each of its questions goes on from there, and only for what
    the model says are attention scores computed.

    Args:
        model: a causal language model; it is left as it was.
        tokenizer: its tokenizer.
        items: of kind "passkey".

    Returns:
        ``[layers, KV heads]``, 0 to 1, float32 on the CPU; 0 in layers with a sliding window of the model's own.

    Raises:
        InputError: the model finds none of the needles.
    """
    layers = Layers(model)
    found, kept, asked = torch.zeros(layers.count, layers.config.num_attention_heads), 0, 0
    ends = frozenset(end_tokens(model))
    with evaluating(model):
        for item in items:
            room = max(one.answer[1] - one.question for one in item.asked)
            past = cache_for(model, item.context + room)
            for part in item.ids[None, : item.context].to(model.device).split(CHUNK, dim=1):
                model(input_ids=part, past_key_values=past, use_cache=True, logits_to_keep=1)
            for one in item.asked:
                hits, said = _answer(model, layers, item, one, copy.deepcopy(past), ends)
                asked += 1
                needle = tokenizer.decode(item.ids[one.needle[0] + GIVEN : one.needle[1]])
                if recall(needle, tokenizer.decode(said)) > RECALL:
                    found += hits / (one.needle[1] - one.needle[0] - GIVEN)
                    kept += 1
    if not kept:
        problem = f"the model found none of {asked} pass phrases in prompts of {len(items[0].ids)} tokens and more"
        raise InputError("heads.score", "retrieval", problem, fix="use another score, e.g. echo")
    return by_kv_head(found / kept, layers.kv_heads)


def _answer(
    model: PreTrainedModel, layers: Layers, item: Item, asked: Asked, past: Cache, ends: frozenset[int]
) -> tuple[Tensor, list[int]]:
    """Hits of every query head ``[layers, heads]`` in the model's own answer to one question, and the answer.

    The cache holds the tokens before the question, and so every needle at the position that it has in the item.
    """
    start, stop = asked.needle
    found = torch.zeros(layers.count, layers.config.num_attention_heads)
    best = torch.full_like(found, -1, dtype=torch.int64)

    def tap(seen: Seen) -> Tensor:
        if seen.layer in layers.full:
            heads, kv_heads = seen.query.shape[1], seen.key.shape[1]
            query = seen.query[0, :, -1].reshape(kv_heads, heads // kv_heads, -1)
            best[seen.layer] = (query @ seen.key[0].transpose(1, 2)).argmax(-1).flatten().cpu()
        return seen.attend()

    question = item.ids[None, asked.question : asked.answer[0] + GIVEN].to(model.device)
    model(input_ids=question[:, :-1], past_key_values=past, use_cache=True, logits_to_keep=1)
    fed, said = question[:, -1:], []
    # Only one row at a time goes through the tap: its attention knows no cache before a row of several tokens.
    with layers.tapped():
        for _ in range(stop - start - GIVEN):
            logits = model(input_ids=fed, past_key_values=past, use_cache=True, logits_to_keep=1, tap=tap).logits
            said.append(int(logits[0, -1].argmax()))
            looked = item.ids[best.clamp(0, item.context - 1)]
            found += (best >= start) & (best < stop) & (looked == said[-1])
            if said[-1] in ends:
                break
            fed = question.new_tensor([said[-1:]])
    return found, said


def recall(expected: str, given: str) -> float:
    """The share of the expected words, each as often as it comes, that were given."""
    words = Counter(expected.split())
    return (words & Counter(given.split())).total() / words.total()
