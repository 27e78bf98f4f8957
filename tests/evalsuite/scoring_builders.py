"""What the tests of continuation scoring share: made-up questions, and a cache that loses something."""

import random

import torch
from compress.evalsuite.prefix_tree import Continuation
from transformers import DynamicCache


def questions(count, context, choices, answer=(1, 6), start=()):
    """Shuffled items: contexts that share ``start``, each with some choices; sizes are (smallest, largest)."""
    draw = random.Random(0)

    def tokens(sizes):
        return tuple(draw.randrange(300) for _ in range(draw.randint(*sizes)))

    items = []
    for _ in range(count):
        asked = (*start, *tokens(context))
        for _ in range(choices):
            rest = tokens(answer)
            items.append(Continuation(asked + rest, len(rest)))
    draw.shuffle(items)
    return items


class Forgetful(DynamicCache):
    """A lossy method: what is stored keeps no values, what is passed through is exact."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.layers[layer_idx].values = torch.zeros_like(self.layers[layer_idx].values)
        return keys, values
