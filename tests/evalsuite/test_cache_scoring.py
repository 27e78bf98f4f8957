"""Perplexity and divergence of what a cache keeps: a prompt fills it, and what is scored comes through it."""

import math
from pathlib import Path

import pytest
import torch
from compress.calibrate.errors import InputError
from compress.evalsuite.compare import compare
from compress.evalsuite.divergence import Reference
from compress.evalsuite.greedy import CACHE_PROMPTS, PROMPTS, cut_prompts
from compress.evalsuite.perplexity import perplexity, perplexity_of
from compress.evalsuite.scan import scan
from compress.evalsuite.score import Material, score, tokenise
from compress.evalsuite.settings import EvalSettings
from compress.evalsuite.sliding import Feed, Windows, check_windows, lay_out
from scoring_builders import Forgetful
from transformers import DynamicCache

WINDOW, PROMPT = 32, 20


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (4 * WINDOW + 7,), generator=torch.Generator().manual_seed(1))


def ordinary(model, ids, windows):
    """Mean loss of each window's tokens behind the prompt, from one pass without a cache."""
    batch = ids[: windows * WINDOW].view(windows, WINDOW)
    with torch.no_grad():
        logprobs = model(batch, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    losses = -logprobs.gather(-1, batch[:, 1:, None])[..., 0]
    return losses[:, PROMPT - 1 :].mean(1).tolist()


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_a_plain_cache_gives_the_ordinary_figures(model, ids, chunk):
    cut = lay_out(ids.numel(), WINDOW, windows=4, feed=Feed(PROMPT, chunk))
    found = perplexity_of(scan(model, ids, cut, cache=DynamicCache), cut)
    assert found.name == "perplexity@20:32"
    assert found.tokens == 4 * (WINDOW - PROMPT)
    assert found.nll == pytest.approx(ordinary(model, ids, 4), rel=1e-5)
    assert found.value == pytest.approx(math.exp(sum(found.nll) / 4), rel=1e-9)


def test_a_model_without_a_factory_goes_through_its_own_cache(model, ids):
    cut = lay_out(ids.numel(), WINDOW, windows=4, feed=Feed(PROMPT, 4))
    assert perplexity_of(scan(model, ids, cut), cut).nll == pytest.approx(ordinary(model, ids, 4), rel=1e-5)


def test_every_chunk_is_given_by_itself(model, ids):
    passes = []

    class Watched(DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            if layer_idx == 0:
                passes.append(key_states.shape[-2])
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    scan(model, ids, lay_out(ids.numel(), WINDOW, windows=1, feed=Feed(PROMPT, 5)), cache=Watched)
    assert passes == [20, 5, 5, 2]


def test_what_a_cache_loses_is_seen(model, ids):
    """What is passed through at once is exact in this cache, so that one pass would see nothing."""
    whole, fed = (lay_out(ids.numel(), WINDOW, windows=4, feed=feed) for feed in (None, Feed(PROMPT, 4)))
    assert [x.nll for x in scan(model, ids, whole, cache=Forgetful)] == pytest.approx(
        [x.nll for x in scan(model, ids, whole)], rel=1e-5
    )
    kept, lost = (scan(model, ids, fed, cache=cache) for cache in (DynamicCache, Forgetful))
    assert min(abs(a.nll / b.nll - 1) for a, b in zip(kept, lost, strict=True)) > 1e-3


def test_token_by_token_the_loss_is_that_of_generation(model, ids):
    cut = lay_out(ids.numel(), WINDOW, windows=1, feed=Feed(PROMPT, 1))
    (found,) = scan(model, ids, cut, cache=Forgetful)
    cache, total = Forgetful(), 0.0
    with torch.no_grad():
        logits = model(ids[None, :PROMPT], past_key_values=cache).logits[0, -1]
        for place in range(PROMPT, WINDOW):
            total -= float(logits.double().log_softmax(-1)[ids[place]])
            logits = model(ids[None, place : place + 1], past_key_values=cache).logits[0, -1]
    assert found.nll == pytest.approx(total, rel=1e-5)


def test_perplexity_with_a_cache_scores_the_second_half(model, ids):
    found = perplexity(model, ids, WINDOW, 3, cache=Forgetful)
    assert found.name == "perplexity@16:32"
    cut = lay_out(ids.numel(), WINDOW, windows=3, feed=Feed(16, 64))
    assert found == perplexity_of(scan(model, ids, cut, cache=Forgetful), cut)


def test_a_stride_keeps_its_context_beside_the_prompt():
    fed = Windows(32, 8, 3, Feed(20))
    assert fed.name == "20:32/8"
    assert fed.scored == (12, 8, 8)
    assert Windows(32, 16, 2, Feed(20)).scored == (12, 12)
    assert Windows(32, None, 2, Feed(1)).name == "32"
    assert Windows(32, None, 2, Feed(1)).scored == Windows(32, None, 2).scored


def test_greedy_answers_of_a_cache_have_long_prompts():
    ids = torch.arange(40 * WINDOW)
    prompts, tokens = cut_prompts(ids, WINDOW, Feed(PROMPT))
    assert (prompts.shape, tokens) == ((CACHE_PROMPTS, PROMPT), WINDOW - PROMPT)
    assert cut_prompts(ids, WINDOW)[0].shape == (PROMPTS, 16)


def test_scores_of_a_cache_and_of_the_dense_model_are_of_the_same_tokens(model, tokenizer, text, tmp_path: Path):
    asked = ["perplexity", "divergence"]
    settings = EvalSettings(window=WINDOW, windows=4, kv_chunk=4).through_cache()
    assert settings.feed == Feed(16, 4)
    reference = Reference(tmp_path)
    material = Material(tokenise(text, tokenizer), reference=reference)
    dense = score(model, tokenizer, asked, settings, material)
    same = score(model, tokenizer, asked, settings, material, DynamicCache)
    lossy = score(model, tokenizer, asked, settings, material, Forgetful)
    assert [metric.metric for metric in lossy.metrics] == [
        "perplexity@16:32", "kl@16:32", "top1_agreement@16:32", "changed_answers@16",
    ]  # fmt: skip
    assert same.divergence.mean_kl < 1e-5 < 1e-3 < lossy.divergence.mean_kl
    assert same.divergence.greedy.changed_tokens == 0
    assert lossy.divergence.tokens == 4 * 16
    assert lossy.divergence.greedy.prompts == CACHE_PROMPTS
    rows = compare(dense, lossy)
    assert rows[0].paired is not None


def test_a_cache_is_never_measured_in_one_pass(model, tokenizer, text):
    material = Material(tokenise(text, tokenizer))
    settings = EvalSettings(window=WINDOW, windows=2)
    assert score(model, tokenizer, ["perplexity"], settings, material, DynamicCache).settings.kv_prompt == 16
    assert score(model, tokenizer, ["perplexity"], settings, material).settings.kv_prompt is None
    mine = EvalSettings(window=WINDOW, windows=2, kv_prompt=9)
    assert score(model, tokenizer, ["perplexity"], mine, material, DynamicCache).settings.kv_prompt == 9


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        (Feed(32), r"eval\.kv_prompt=32: would leave nothing of a window to score; allowed: 1 to 31"),
        (Feed(0), r"eval\.kv_prompt=0: "),
        (Feed(8, 0), r"eval\.kv_chunk=0: "),
    ],
)
def test_bad_feeds_are_told(feed, message):
    with pytest.raises(InputError, match=message):
        check_windows(32, None, None, None, feed)
