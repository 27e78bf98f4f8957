"""Our model interface beside lm-eval's own: the same requests must get the same answers."""

import random
import sys
from contextlib import ExitStack

import pytest
import torch
from compress.calibrate.errors import InputError
from compress.evalsuite import bridge
from compress.evalsuite.bridge import LoadedModel
from compress.evalsuite.continuations import _pick_scorer
from compress.evalsuite.logits import TokenLogits
from compress.evalsuite.prefix_tree import Continuation
from compress.evalsuite.quiet import quiet, seeded
from compress.evalsuite.settings import EvalSettings
from compress.evalsuite.tree_scorer import TreeScorer
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from models import CONFIGS, build_model, build_tokenizer
from scoring_builders import Forgetful
from transformers import DynamicCache

WORDS = ["the", "hen", "and", "an", "inn", "in", "a", "tin:", "then", "he", "ran,", "thin", "as", "an", "end"]


def requests(kind, *arguments):
    return [Instance(kind, {}, given, index, metadata=("the task", index, 1)) for index, given in enumerate(arguments)]


def questions(count=16, words=(3, 16), choices=("the hen", "an", "a tin inn")):
    draw = random.Random(0)
    pairs = []
    for _ in range(count):
        text = " ".join(draw.choices(WORDS, k=draw.randint(*words)))
        pairs += [(f"Question: {text}\nAnswer:", f" {choice}") for choice in choices]
    draw.shuffle(pairs)
    return pairs


ODD_PAIRS = [
    ("", "the hen"),  # no context: the first token stands for one
    ("", "<|endoftext|>the hen"),  # and if the continuation begins with it, it is the context
    ("the hen ran  ", "in a tin"),  # spaces move to the continuation
    ("the hen\n", "ran"),
    ("the h", "en ran"),  # as one text the tokens would be others
    ("<|endoftext|>the hen", " ran"),
    ("the hen", "e"),
    ("the hen", "a"),
    ("   ", "hen"),
]


@pytest.fixture(scope="module")
def pair():
    """For a family, the two interfaces around one model."""
    built = {}

    def make(family, batch_size=4, max_length=None, tokenizer=None, **ours):
        if family not in built:
            built[family] = build_model(family)
        settings = EvalSettings(batch_size=batch_size, max_length=max_length)
        tokenizers = [tokenizer or build_tokenizer() for _ in range(2)]
        with quiet():
            theirs = HFLM(
                pretrained=built[family], tokenizer=tokenizers[0], batch_size=batch_size, max_length=max_length
            )
            return theirs, LoadedModel(built[family], tokenizers[1], settings, (sys.stdout, sys.stderr), **ours)

    return make


@pytest.fixture(autouse=True)
def no_noise():
    with ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(seeded())
        yield


def agree(found, expected):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)


@torch.no_grad()
def rows_pay(ours, asked):
    """Whether there is enough to share, so that shared beginnings are really tested."""
    found = ours._encode_pairs([request.args for request in asked])
    items = [Continuation((*context, *rest), len(rest)) for _, context, rest in found]
    logits = TokenLogits(ours.model, items[0].tokens)
    return isinstance(_pick_scorer(logits, items, ours.batch_size, None), TreeScorer)


@pytest.mark.parametrize("family", CONFIGS)
def test_multiple_choice(pair, family):
    theirs, ours = pair(family)
    asked = requests("loglikelihood", *questions())
    assert rows_pay(ours, asked)
    agree(ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True))


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_batch_sizes(pair, batch_size):
    theirs, ours = pair("qwen2", batch_size)
    asked = requests("loglikelihood", *questions())
    agree(ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True))


@pytest.mark.parametrize("max_length", [12, 20, 33])
def test_what_is_too_long_loses_its_beginning(pair, max_length):
    theirs, ours = pair("mistral", max_length=max_length)
    asked = requests("loglikelihood", *questions())
    assert max(len(ours.tok_encode(context)) for context, _ in questions()) > max_length
    agree(ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True))


def test_odd_pairs_become_the_same_tokens(pair):
    theirs, ours = pair("llama")
    encoded = ours._encode_pairs(ODD_PAIRS)
    for given, (texts, context, continuation) in zip(ODD_PAIRS, encoded, strict=True):
        assert texts == given
        if given[0].strip():
            assert (context, continuation) == theirs._encode_pair(*given)
    asked = requests("loglikelihood", *ODD_PAIRS[:-1])  # HFLM fails on the last, which has a context without tokens
    agree(ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True))
    blank = requests("loglikelihood", ("   ", "hen"))
    agree(ours.loglikelihood(blank), ours.loglikelihood(requests("loglikelihood", ("", "   hen"))))


def test_greedy_continuations_and_one_token_groups(pair):
    theirs, ours = pair("llama")
    model, asked = theirs.model, []
    for start in range(3):
        prompt = torch.tensor([[start + 5, 40, 50, 60]])
        whole = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)[0].tolist()
        asked += [(("", ""), whole[:4], whole[4:]), (("", ""), whole[:4], [*whole[4:7], 9, 9])]
        asked += [(("", ""), whole[:6], [token]) for token in (whole[6], 7, 8)]
    expected = theirs._loglikelihood_tokens(asked, disable_tqdm=True)
    agree(ours._loglikelihood_tokens(asked), expected)
    assert sum(greedy for _, greedy in expected) == 6


def test_a_tokenizer_that_adds_a_first_token(pair):
    from tokenizers.processors import TemplateProcessing

    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    theirs, ours = pair("llama", tokenizer=tokenizer)
    pairs = [*questions(2), *ODD_PAIRS]
    asked = requests("loglikelihood", *pairs)
    assert ours._encode_pairs(pairs)[0][1][0] == 0
    agree(ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True))


@pytest.mark.parametrize(("context", "continuation", "max_length", "problem"), [
    ("the hen", "", None, "one of its answers is empty"),
    ("", "", None, "one of its answers is empty"),
    ("the hen", " ran" * 20, 10, r"one of its answers has \d+ tokens, more than the model's context of 10"),
])  # fmt: skip
def test_answers_that_do_not_fit(pair, context, continuation, max_length, problem):
    _, ours = pair("llama", max_length=max_length)
    with pytest.raises(InputError, match=f"eval.tasks=the task: {problem}"):
        ours.loglikelihood(requests("loglikelihood", (context, continuation)))


@pytest.mark.parametrize("max_length", [None, 10])
def test_whole_texts(pair, max_length):
    theirs, ours = pair("qwen2", max_length=max_length)
    texts = requests("loglikelihood_rolling", *((" ".join(WORDS * times),) for times in (1, 3)), ("a",))
    expected = theirs.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(expected, abs=1e-3)


def prompts(*options):
    draw = random.Random(0)
    return requests(
        "generate_until",
        *((" ".join(draw.choices(WORDS, k=draw.randint(2, 12))), dict(option)) for option in options for _ in range(5)),
    )


GREEDY = {"until": ["zq"], "max_gen_toks": 9}


@pytest.mark.parametrize("family", CONFIGS)
def test_generated_text(pair, family):
    theirs, ours = pair(family)
    asked = prompts(GREEDY, {"until": ["he", "\n"], "max_gen_toks": 12, "do_sample": False})
    expected = theirs.generate_until(asked, disable_tqdm=True)
    assert ours.generate_until(asked) == expected
    assert len(set(expected)) > 3


def test_samples_are_drawn_in_order(pair):
    theirs, ours = pair("llama")
    asked = prompts(GREEDY | {"do_sample": True, "temperature": 1.5})
    torch.manual_seed(3)
    expected = theirs.generate_until(asked, disable_tqdm=True)
    torch.manual_seed(3)
    assert ours.generate_until(asked) == expected


def test_long_prompts_make_room_for_what_is_generated(pair):
    theirs, ours = pair("llama", max_length=20)
    asked = prompts(GREEDY)
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)
    problem = "eval.tasks=the task: it generates 20 tokens, and the model's context is 20"
    with pytest.raises(InputError, match=problem):
        ours.generate_until(prompts(GREEDY | {"max_gen_toks": 20}))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_generation_goes_through_the_cache(pair, family):
    """Each prompt alone, so that a method never takes padding for text."""
    made = []

    def cache():
        made.append(Forgetful())
        return made[-1]

    _, ours = pair(family, cache=cache)
    asked = prompts(GREEDY)
    found = ours.generate_until(asked)
    assert len(made) == len(asked)
    assert min(held.get_seq_length() for held in made) > 1
    model, tokenizer = ours.model, build_tokenizer()
    for request, text in zip(asked, found, strict=True):
        ids = tokenizer(request.args[0], return_tensors="pt")
        whole = model.generate(**ids, max_new_tokens=9, do_sample=False, past_key_values=Forgetful())
        expected = tokenizer.decode(whole[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text == expected.split("zq")[0]
    _, exact = pair(family, cache=lambda: DynamicCache(config=model.config))
    _, plain = pair(family, batch_size=1)
    assert exact.generate_until(asked) == plain.generate_until(asked) != found


def test_likelihoods_go_through_the_cache(pair):
    theirs, ours = pair("llama", cache=DynamicCache)
    _, lossy = pair("llama", cache=Forgetful)
    asked = requests("loglikelihood", *questions())
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    agree(ours.loglikelihood(asked), expected)
    found = lossy.loglikelihood(asked)
    assert max(abs(value - exact) for (value, _), (exact, _) in zip(found, expected, strict=True)) > 1e-3
    texts = requests("loglikelihood_rolling", (" ".join(WORDS),))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), abs=1e-3)


def test_answers_are_offered_to_lm_evals_own_store(pair, monkeypatch):
    _, ours = pair("llama")
    kept = []
    monkeypatch.setattr(ours.cache_hook, "add_partial", lambda *entry: kept.append(entry))
    asked = requests("loglikelihood", ("the hen", " ran"))
    (answer,) = ours.loglikelihood(asked)
    text = requests("loglikelihood_rolling", ("the hen",))
    (value,) = ours.loglikelihood_rolling(text)
    prompt = prompts(GREEDY)[:1]
    (said,) = ours.generate_until(prompt)
    assert kept == [
        ("loglikelihood", ("the hen", " ran"), answer),
        ("loglikelihood_rolling", ("the hen",), value),
        ("generate_until", prompt[0].args, said),
    ]


def test_the_chat_template_is_lm_evals(pair):
    theirs, ours = pair("llama")
    turns = [{"role": "user", "content": "the hen"}]
    assert ours.apply_chat_template(turns) == theirs.apply_chat_template(turns)
    assert "<|im_start|>" in ours.apply_chat_template(turns)
    assert bridge.LoadedModel.chat_template is HFLM.chat_template
