import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from compress.calibrate.errors import InputError
from compress.evalsuite import head
from compress.evalsuite.perplexity import perplexity, perplexity_of
from compress.evalsuite.scan import WindowScore, scan
from compress.evalsuite.sliding import Feed, Windows
from transformers import DynamicCache

WINDOW = 32


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (5 * WINDOW + 7,), generator=torch.Generator().manual_seed(1))


def straightforward(model, ids, windows):
    """Full logits in one batch, first token of each window as context only."""
    batch = ids[: windows * WINDOW].view(windows, WINDOW)
    with torch.no_grad():
        logits = model(batch).logits[:, :-1].double()
    loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
    return loss.view(windows, -1).mean(1)


def test_equals_full_logits(model, ids):
    found = perplexity(model, ids, WINDOW)
    expected = straightforward(model, ids, 5)
    assert found.name == "perplexity@32"
    assert found.tokens == 5 * 31
    assert found.nll == pytest.approx(expected.tolist(), rel=1e-5)
    assert found.value == pytest.approx(expected.mean().exp().item(), rel=1e-5)
    assert found.stderr == pytest.approx(found.value * expected.std().item() / math.sqrt(5), rel=1e-4)


def test_only_the_first_windows_count(model, ids):
    found = perplexity(model, ids, WINDOW, windows=2)
    assert found.nll == pytest.approx(straightforward(model, ids, 2).tolist(), rel=1e-5)


def test_a_single_window_has_no_standard_error(model, ids):
    assert perplexity(model, ids, WINDOW, windows=1).stderr is None


def test_logits_are_made_in_chunks(model, ids, monkeypatch):
    tokens_at_once = []
    hook = model.lm_head.register_forward_hook(lambda m, i, out: tokens_at_once.append(out.shape[-2]))
    monkeypatch.setattr(head, "LOGITS_BYTES", 10 * 2 * 4 * 258)
    try:
        found = perplexity(model, ids, WINDOW, windows=3)
    finally:
        hook.remove()
    # The first two calls are the probe that checks whether the head may be applied on its own.
    assert tokens_at_once == [8, 8] + 3 * [10, 10, 10, 1]
    assert found.nll == pytest.approx(straightforward(model, ids, 3).tolist(), rel=1e-5)


class Capped(torch.nn.Module):
    """A model whose logits are capped behind the head, as Gemma 2's are."""

    def __init__(self, model):
        super().__init__()
        self.config, self.inner, self.base_model = model.config, model, model.base_model
        self.get_input_embeddings, self.get_output_embeddings = model.get_input_embeddings, model.get_output_embeddings

    def forward(self, input_ids, use_cache=None):
        logits = self.inner(input_ids=input_ids, use_cache=use_cache).logits
        return SimpleNamespace(logits=30 * torch.tanh(logits / 30))


def test_what_lies_behind_the_head_is_kept(model, ids):
    capped = Capped(model)
    found = perplexity(capped, ids, WINDOW)
    assert found.nll == pytest.approx(straightforward(capped, ids, 5).tolist(), rel=1e-5)
    assert found.value != pytest.approx(perplexity(model, ids, WINDOW).value, rel=1e-4)


def test_half_precision_and_the_mode_of_the_model(model, ids):
    half = type(model)(model.config).to(torch.bfloat16).train()
    half.load_state_dict({name: tensor.bfloat16() for name, tensor in model.state_dict().items()})
    assert perplexity(half, ids, WINDOW).value == pytest.approx(perplexity(model, ids, WINDOW).value, rel=0.05)
    assert half.training


def test_overflow_is_infinite_not_an_error():
    scores = [WindowScore(800.0 * (WINDOW - 1))] * 2
    assert perplexity_of(scores, Windows(WINDOW, None, 2)).value == math.inf


# Sliding windows


def token_losses(model, ids, window, stride):
    """Negative log-likelihood of every token but the first, by the loop of Hugging Face's documentation."""
    found = {}
    end_before = 0
    for begin in range(0, len(ids) - window + 1, stride):
        piece = ids[begin : begin + window]
        with torch.no_grad():
            logprobs = model(piece[None]).logits[0].double().log_softmax(-1)
        for place in range(max(end_before - begin, 1), window):
            assert begin + place not in found
            found[begin + place] = -float(logprobs[place - 1, piece[place]])
        end_before = begin + window
    return found


@pytest.mark.parametrize("stride", [1, 8, 20, 31])
def test_a_stride_equals_a_naive_loop(model, ids, stride):
    found = perplexity(model, ids[: 3 * WINDOW], WINDOW, stride=stride)
    expected = token_losses(model, ids[: 3 * WINDOW], WINDOW, stride)
    assert found.name == f"perplexity@32/{stride}"
    assert found.tokens == len(expected) == max(expected)  # every token but the first, once
    assert math.log(found.value) == pytest.approx(sum(expected.values()) / len(expected), rel=1e-5)
    assert found.weights == (31, *[stride] * (len(found.nll) - 1)) or stride == 31
    last = [expected[place] for place in sorted(expected)[-stride:]]
    assert found.nll[-1] == pytest.approx(sum(last) / stride, rel=1e-5)


def test_a_stride_of_a_window_is_no_overlap(model, ids):
    assert perplexity(model, ids, WINDOW, stride=WINDOW) == perplexity(model, ids, WINDOW)


def test_context_helps_or_at_least_changes(model, ids):
    assert perplexity(model, ids, WINDOW, stride=8).value != perplexity(model, ids, WINDOW).value
    assert len(perplexity(model, ids, WINDOW, 3, stride=8).nll) == 3


def test_the_standard_error_with_a_stride_weighs_windows(model, ids):
    found = perplexity(model, ids, WINDOW, stride=16)
    loss = math.log(found.value)
    total = sum((weight * (nll - loss)) ** 2 for weight, nll in zip(found.weights, found.nll, strict=True))
    count = len(found.nll)
    assert found.stderr == pytest.approx(found.value * math.sqrt(count / (count - 1) * total) / found.tokens)


def test_every_window_goes_through_a_cache_of_its_own(model, ids):
    made = []

    def cache():
        made.append(DynamicCache(config=model.config))
        return made[-1]

    found = perplexity(model, ids, WINDOW, windows=3, cache=cache)
    assert [one.get_seq_length() for one in made] == [32, 32, 32]
    cut = Windows(WINDOW, None, 3, Feed(WINDOW // 2))
    assert found.nll == pytest.approx(perplexity_of(scan(model, ids, cut), cut).nll, rel=1e-6)


@pytest.mark.parametrize(
    ("count", "window", "windows", "message"),
    [
        (31, 32, None, "the text holds only 31 tokens; use a longer text or a window of at most 31"),
        (0, 32, None, "the text holds only 0 tokens"),
        (1000, 1, None, "eval.window=1: a window holds at least two tokens"),
        (1000, 512, None, "eval.window=512: is longer than the model's context; allowed: 2 to 256"),
        (1000, 32, 0, "eval.windows=0"),
    ],
)
def test_bad_windows_are_told(model, count, window, windows, message):
    with pytest.raises(InputError, match=message):
        perplexity(model, torch.zeros(count, dtype=torch.long), window, windows)


@pytest.mark.parametrize("stride", [0, -1, 33])
def test_bad_strides_are_told(model, ids, stride):
    with pytest.raises(InputError, match=rf"eval\.stride={stride}: .*; allowed: 1 to 32, the window"):
        perplexity(model, ids, 32, stride=stride)
