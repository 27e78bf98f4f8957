"""A fake model that reads: it finds the needle in its prompt, wherever that is, and answers with it."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

VOCABULARY, END = 258, 257
ASKED = re.compile(r"(?:The pass key|The secret \w+ of \S+|The REGISTER_CONTENT of line \S+) is(?: <)?$")
FACTS = (
    ("The pass key is", r"The pass key is (\d+)\."),
    ("The secret", r"The secret \w+ of {key} is ([\w-]+)\."),
    ("The REGISTER_CONTENT", r"line {key}: REGISTER_CONTENT is <(\d+)>"),
)


def read(prompt: str) -> str | None:
    """The value that a prompt asks for; None for the first part of a prompt, which doesn't ask yet."""
    question = ASKED.search(prompt)
    if question is None:
        return None
    pattern = next(pattern for start, pattern in FACTS if question[0].startswith(start))
    words = question[0].removesuffix(" <").split()
    found = re.search(pattern.replace("{key}", re.escape(words[-2])), prompt)
    assert found is not None
    return found[1]


class Reader(torch.nn.Module):
    """Says, one byte at a time, what ``answer`` gives for the prompt, and then ends. Its cache is the text so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, answer: Callable[[str], str | None] = read) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=8192)
        self.generation_config = SimpleNamespace(eos_token_id=END)
        self.device = torch.device("cpu")
        self._tokenizer, self._answer = tokenizer, answer

    def forward(self, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool, logits_to_keep: int) -> Any:
        assert not self.training
        assert use_cache
        assert logits_to_keep == 1
        prompt, left = past_key_values or ("", None)
        text = self._tokenizer.decode(input_ids[0])
        if left is None:
            prompt += text
            left = self._answer(prompt)
        else:
            assert text == left[0]  # what was said is fed back, once
            left = left[1:]
        likeliest = self._tokenizer.convert_tokens_to_ids(left[0].replace(" ", "Ġ")) if left else END
        logits = torch.zeros(1, 1, VOCABULARY).index_fill(2, torch.tensor(likeliest), 1.0)
        return SimpleNamespace(logits=logits, past_key_values=(prompt, left))
