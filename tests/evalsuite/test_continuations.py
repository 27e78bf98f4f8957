import copy

import pytest
import torch
from compress.evalsuite import continuations
from compress.evalsuite.continuations import CacheScorer, WholeScorer, score_continuations
from compress.evalsuite.logits import TokenLogits
from compress.evalsuite.prefix_tree import Continuation
from compress.evalsuite.tree_scorer import TreeScorer, layer_windows, rows_are_exact
from models import CONFIGS, build_model
from scoring_builders import Forgetful, questions
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ITEMS = {
    "questions": questions(5, (2, 30), 3),
    "one token each": questions(3, (2, 30), 4, (1, 1)),
    "shared examples": questions(9, (1, 12), 2, start=tuple(range(90))),
    "whole texts": [Continuation(tuple((7 * i + j * j) % 300 for j in range(60)), 59) for i in range(2)],
}
MANY = questions(25, (15, 30), 4)


@torch.no_grad()
def one_by_one(model, items):
    """The plain meaning: each sequence in a forward pass of its own."""
    found = []
    for item in items:
        logits = model(torch.tensor([item.inputs])).logits[0, -item.scored :]
        targets = torch.tensor(item.targets)
        value = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
        found.append((float(value), bool((logits.argmax(-1) == targets).all())))
    return found


@torch.no_grad()
def by_tree(model, items):
    """The same in rows, which would not pay for so few items."""
    logits = TokenLogits(model, items[0].tokens)
    windows = layer_windows(model.config)
    assert rows_are_exact(logits, items, windows)
    scorer = TreeScorer(logits, items, windows, 2)
    found = [answer for job in scorer.jobs() for answer in scorer.run(job)]
    return [answer for _, answer in sorted(found)]


def agree(found, expected):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)


def greedy_items(model):
    """Sequences of which the model would have said the end itself."""
    items = []
    for start in range(3):
        prompt = torch.tensor([[start, 5, 9, 14]])
        whole = model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)[0].tolist()
        items += [Continuation(tuple(whole), 5), Continuation((*whole[:-1], (whole[-1] + 1) % 300), 5)]
    return items


@pytest.fixture
def scorers(monkeypatch):
    """Names of the scorers that were used."""
    used = []
    real = continuations._pick_scorer

    def pick(*args):
        scorer = real(*args)
        used.append(type(scorer))
        return scorer

    monkeypatch.setattr(continuations, "_pick_scorer", pick)
    return used


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CONFIGS)
def test_all_families(family, attention):
    model = build_model(family)
    model.set_attn_implementation(attention)
    for items in [*ITEMS.values(), greedy_items(model)]:
        expected = one_by_one(model, items)
        agree(by_tree(model, items), expected)
        agree(score_continuations(model, items), expected)
    assert {greedy for _, greedy in expected} == {True, False}


def test_results_depend_neither_on_the_order_nor_on_the_batch():
    model = build_model("llama")
    items = ITEMS["questions"]
    forward = score_continuations(model, items)
    agree(score_continuations(model, items[::-1])[::-1], forward)
    agree(score_continuations(model, items, batch_size=1), forward)
    assert score_continuations(model, []) == []


def test_progress():
    told = []
    score_continuations(build_model("llama"), ITEMS["questions"], batch_size=1, done=told.append)
    assert len(told) > 1
    assert sum(told) == len(ITEMS["questions"])


def test_the_way_that_pays_is_taken(scorers):
    model = build_model("llama")
    agree(score_continuations(model, MANY), one_by_one(model, MANY))
    score_continuations(model, ITEMS["whole texts"])  # nothing to share
    score_continuations(model, MANY[:2])  # too little to share
    assert scorers == [TreeScorer, WholeScorer, WholeScorer]


def test_logits_that_the_head_alone_does_not_give():
    """A model that scales its logits behind the head."""
    model = build_model("llama")

    class Scaled(type(model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 0.5 * output.logits
            return output

    model.__class__ = Scaled
    agree(score_continuations(model, MANY), one_by_one(model, MANY))


def test_attention_of_a_method_sees_whole_sequences(scorers):
    """Its own masks are its own business: one sequence in each row, no padding, no mask of ours."""
    calls = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        calls.append((tuple(query.shape), attention_mask))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("test_method", attention)
    AttentionMaskInterface.register("test_method", sdpa_mask)
    model = build_model("qwen3")
    expected = one_by_one(model, MANY)
    model.set_attn_implementation("test_method")
    agree(score_continuations(model, MANY, 4), expected)
    assert scorers == [WholeScorer]
    assert all(mask is None for _, mask in calls)
    assert max(shape[0] for shape, _ in calls) > 1


@pytest.mark.parametrize("ignored", ["attention_mask", "position_ids"])
def test_a_model_that_ignores_mask_or_positions_is_found_out(ignored, scorers):
    model = build_model("llama")

    class Deaf(type(model.model)):
        def forward(self, *args, **kwargs):
            kwargs.pop(ignored, None)
            return super().forward(*args, **kwargs)

    model.model.__class__ = Deaf
    agree(score_continuations(model, MANY), one_by_one(model, MANY))
    assert scorers == [WholeScorer]


def test_a_model_that_refuses_masks(scorers):
    model = build_model("llama")

    class Refusing(type(model.model)):
        def forward(self, *args, attention_mask=None, **kwargs):
            if attention_mask is not None:
                raise ValueError("no masks, please")
            return super().forward(*args, **kwargs)

    model.model.__class__ = Refusing
    agree(score_continuations(model, MANY), one_by_one(model, MANY))
    assert scorers == [WholeScorer]


def test_which_masks_can_be_ours():
    assert layer_windows(build_model("llama").config) == {"full_attention": None}
    assert layer_windows(build_model("mistral").config) == {"full_attention": 8}
    assert layer_windows(build_model("qwen2").config) == {"full_attention": None, "sliding_attention": 8}
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    stretched = LlamaForCausalLM(LlamaConfig(vocab_size=50, rope_parameters=rope, **small))
    assert layer_windows(stretched.config) is None
    mixed = copy.deepcopy(build_model("qwen2").config)
    mixed.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    assert layer_windows(mixed) is None


def test_half_precision():
    model = build_model("llama").to(torch.bfloat16)
    found = score_continuations(model, ITEMS["questions"])
    for (value, _), (expected, _), item in zip(
        found, one_by_one(model, ITEMS["questions"]), ITEMS["questions"], strict=True
    ):
        assert value == pytest.approx(expected, abs=0.1 * item.scored)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("name", ITEMS)
def test_with_a_cache(family, name, scorers):
    model = build_model(family)
    made = []

    def cache():
        made.append(DynamicCache(config=model.config))
        return made[-1]

    items = ITEMS[name]
    agree(score_continuations(model, items, cache=cache), one_by_one(model, items))
    assert scorers == [CacheScorer]
    assert len(made) == len({item.tokens[: item.context] for item in items})
    longest = max(items, key=lambda item: len(item.tokens))
    assert max(held.get_seq_length() for held in made) >= longest.context


@torch.no_grad()
def test_what_the_cache_loses_is_lost():
    model = build_model("llama")
    items = ITEMS["questions"]
    found = score_continuations(model, items, cache=Forgetful)
    for (value, _), (exact, _), item in zip(found, one_by_one(model, items), items, strict=True):
        if item.scored == 1:  # predicted by the prefill
            assert value == pytest.approx(exact, abs=1e-4)
            continue
        past = Forgetful()
        first = model(torch.tensor([item.tokens[: item.context]]), past_key_values=past).logits[0, -1:]
        rest = model(torch.tensor([item.targets[:-1]]), past_key_values=past).logits[0]
        logprobs = torch.cat([first, rest]).log_softmax(-1)
        assert value == pytest.approx(float(logprobs.gather(1, torch.tensor(item.targets)[:, None]).sum()), abs=1e-4)
        assert abs(value - exact) > 1e-3
