import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from compress.calibrate.errors import InputError
from compress.evalsuite import perplexity as module
from compress.evalsuite.perplexity import perplexity

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
    monkeypatch.setattr(module, "LOGITS_BYTES", 10 * 2 * 4 * 258)
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
    assert module._summarise([800.0, 800.0], WINDOW).value == math.inf


@pytest.mark.parametrize(
    ("count", "window", "windows", "message"),
    [
        (31, 32, None, "the text holds only 31 tokens; use a longer text or a window of at most 31"),
        (0, 32, None, "the text holds only 0 tokens"),
        (1000, 1, None, "eval.window=1: a window holds at least two tokens"),
        (1000, 512, None, "longer than the model's context of 256 tokens"),
        (1000, 32, 0, "eval.windows=0"),
    ],
)
def test_bad_windows_are_told(model, count, window, windows, message):
    with pytest.raises(InputError, match=message):
        perplexity(model, torch.zeros(count, dtype=torch.long), window, windows)
