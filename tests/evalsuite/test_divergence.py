"""Divergence from the dense model, against full logits and against plain generation."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from compress.evalsuite import head
from compress.evalsuite.divergence import Reference
from compress.evalsuite.greedy import compare_answers, cut_prompts, greedy_answers
from compress.evalsuite.perplexity import perplexity, perplexity_of
from compress.evalsuite.scan import States, scan
from compress.evalsuite.sliding import Windows
from transformers import DynamicCache

WINDOW = 32
PLAIN = Windows(WINDOW, None, 4)
SLIDING = Windows(WINDOW, 12, 6)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 256, (5 * WINDOW,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def other(model):
    """The model with a little noise, as compression leaves it."""
    changed = type(model)(model.config).eval()
    generator = torch.Generator().manual_seed(2)
    noisy = {k: v + 0.02 * torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()}
    changed.load_state_dict(noisy)
    return changed


def divergence(dense, compressed, ids, windows, folder):
    """Of a model from another, one after the other."""
    reference = Reference(folder)
    reference.score(dense, ids, windows)
    return reference.score(compressed, ids, windows)[1]


def full_logits(model, ids, windows):
    """Log-probabilities ``[scored tokens, vocabulary]`` of each window, all at once."""
    found = []
    for index in range(windows.count):
        piece = ids[windows.start(index) : windows.start(index) + windows.window]
        with torch.no_grad():
            found.append(model(piece[None]).logits[0, windows.context(index) - 1 : -1].double().log_softmax(-1))
    return found


@pytest.mark.parametrize("windows", [PLAIN, SLIDING])
def test_equals_full_logits(model, other, ids, tmp_path, windows):
    found = divergence(model, other, ids, windows, tmp_path)
    p, q = full_logits(model, ids, windows), full_logits(other, ids, windows)
    kl = [(one.exp() * (one - two)).sum(-1) for one, two in zip(p, q, strict=True)]
    assert found.kl == pytest.approx([float(part.mean()) for part in kl], rel=1e-3, abs=1e-6)
    assert found.mean_kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3)
    assert 0.001 < found.mean_kl < 1
    same = torch.cat(p).argmax(-1) == torch.cat(q).argmax(-1)
    assert found.top1_agreement == pytest.approx(float(same.double().mean()))
    assert 0.1 < found.top1_agreement < 1
    assert (found.windows, found.tokens) == (windows.count, len(same))
    assert found.weights == windows.weights


def test_the_direction_is_from_the_dense_model(model, other, ids, tmp_path):
    (tmp_path / "back").mkdir()
    there = divergence(model, other, ids, PLAIN, tmp_path)
    back = divergence(other, model, ids, PLAIN, tmp_path / "back")
    assert there.mean_kl != pytest.approx(back.mean_kl, rel=1e-3)
    assert there.top1_agreement == back.top1_agreement


def test_the_standard_error_is_over_windows(model, other, ids, tmp_path):
    found = divergence(model, other, ids, PLAIN, tmp_path)
    assert found.kl_stderr == pytest.approx(torch.tensor(found.kl).double().std().item() / math.sqrt(4), rel=1e-6)
    (tmp_path / "one").mkdir()
    assert divergence(model, other, ids, Windows(WINDOW, None, 1), tmp_path / "one").kl_stderr is None


def test_a_model_does_not_diverge_from_itself(model, ids, tmp_path):
    found = divergence(model, model, ids, SLIDING, tmp_path)
    assert found.mean_kl == pytest.approx(0, abs=1e-9)
    assert found.top1_agreement == 1.0
    assert (found.greedy.changed_answers, found.greedy.changed_tokens) == (0.0, 0.0)


def test_the_same_pass_gives_perplexity(model, other, ids, tmp_path):
    reference = Reference(tmp_path)
    dense, nothing = reference.score(model, ids, PLAIN)
    assert nothing is None
    after, _ = reference.score(other, ids, PLAIN)
    assert perplexity_of(dense, PLAIN) == perplexity(model, ids, WINDOW, 4)
    assert perplexity_of(after, PLAIN).nll == pytest.approx(perplexity(other, ids, WINDOW, 4).nll, rel=1e-6)


def test_only_states_are_kept_and_logits_are_made_in_chunks(model, other, ids, tmp_path, monkeypatch):
    monkeypatch.setattr(head, "LOGITS_BYTES", 7 * 5 * 4 * 258)
    sizes = []
    hooks = [one.lm_head.register_forward_hook(lambda m, i, out: sizes.append(out.shape[-2])) for one in (model, other)]
    try:
        found = divergence(model, other, ids, PLAIN, tmp_path)
    finally:
        for hook in hooks:
            hook.remove()
    assert (tmp_path / "states").stat().st_size == 4 * 31 * 32 * 4  # windows, tokens, hidden size, float32
    whole = [size for size in sizes if size > 17]
    assert whole == []
    monkeypatch.undo()
    (tmp_path / "again").mkdir()
    assert divergence(model, other, ids, PLAIN, tmp_path / "again").kl == pytest.approx(found.kl, rel=1e-4, abs=1e-7)


def test_half_precision_states(model, other, ids, tmp_path):
    half = type(model)(model.config).to(torch.bfloat16).eval()
    half.load_state_dict({name: tensor.bfloat16() for name, tensor in model.state_dict().items()})
    states = States(tmp_path / "states")
    scan(half, ids, PLAIN, states=states)
    assert states.dtype == torch.bfloat16
    assert (tmp_path / "states").stat().st_size == 4 * 31 * 32 * 2
    scores = scan(half, ids, PLAIN, states=states)
    assert sum(score.kl for score in scores) == pytest.approx(0, abs=1e-7)
    assert sum(score.kl for score in scan(other, ids, PLAIN, states=states)) > 0.1


class Capped(torch.nn.Module):
    """A model that does something to its logits behind its head."""

    def __init__(self, model):
        super().__init__()
        self.config, self.inner, self.base_model = model.config, model, model.base_model
        self.get_input_embeddings, self.get_output_embeddings = model.get_input_embeddings, model.get_output_embeddings

    def forward(self, input_ids, use_cache=None):
        return SimpleNamespace(logits=5 * torch.tanh(self.inner(input_ids=input_ids, use_cache=use_cache).logits / 5))


def test_what_lies_behind_the_head_is_kept(model, other, ids, tmp_path):
    states = States(tmp_path / "states")
    scan(Capped(model), ids, PLAIN, states=states)
    found = [score.kl for score in scan(Capped(other), ids, PLAIN, states=states)]
    p, q = full_logits(Capped(model), ids, PLAIN), full_logits(Capped(other), ids, PLAIN)
    expected = [float((one.exp() * (one - two)).sum()) for one, two in zip(p, q, strict=True)]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-5)


def padded(model, rows):
    """The same model with more rows in its embedding and its head, which predict tokens that there aren't."""
    wide = copy.deepcopy(model)
    if rows == model.config.vocab_size:
        return wide
    wide.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        wide.lm_head.weight[model.config.vocab_size :] = 0.5
    return wide


@pytest.mark.parametrize(("dense", "compressed"), [(258, 320), (320, 258), (320, 300)])
def test_padded_embeddings_are_compared_as_far_as_both_go(model, other, ids, tmp_path, dense, compressed):
    before, after, size = padded(model, dense), padded(other, compressed), min(dense, compressed)
    states = States(tmp_path / "states")
    scan(before, ids, PLAIN, states=states)
    found = scan(after, ids, PLAIN, states=states)
    p, q = ([part[:, :size].log_softmax(-1) for part in full_logits(one, ids, PLAIN)] for one in (before, after))
    kl = [float((one.exp() * (one - two)).sum()) for one, two in zip(p, q, strict=True)]
    assert [score.kl for score in found] == pytest.approx(kl, rel=1e-3)
    same = [int((one.argmax(-1) == two.argmax(-1)).sum()) for one, two in zip(p, q, strict=True)]
    assert [score.agreed for score in found] == same
    assert [score.nll for score in found] == pytest.approx([score.nll for score in scan(after, ids, PLAIN)])


def test_padding_alone_is_no_divergence(model, ids, tmp_path):
    found = divergence(model, padded(model, 320), ids, PLAIN, tmp_path)
    assert found.mean_kl == pytest.approx(0, abs=1e-6)
    assert found.top1_agreement == 1


def test_refuses_other_windows(model, ids, tmp_path):
    states = States(tmp_path / "states")
    scan(model, ids, PLAIN, states=states)
    with pytest.raises(ValueError, match="the states are of"):
        scan(model, ids, SLIDING, states=states)


# Greedy answers


def test_greedy_answers_are_those_of_generate(model, ids):
    prompts, tokens = cut_prompts(ids, WINDOW)
    assert (prompts.shape, tokens) == ((10, 16), 16)
    found = greedy_answers(model, prompts, tokens)
    expected = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )[:, 16:]
    assert torch.equal(found, expected)  # none of them ends


def test_greedy_answers_through_a_cache(model, ids):
    made = []

    def cache():
        made.append(DynamicCache(config=model.config))
        return made[-1]

    prompts, tokens = cut_prompts(ids, WINDOW)
    assert torch.equal(greedy_answers(model, prompts, tokens, cache), greedy_answers(model, prompts, tokens))
    assert [len(one.layers[0].keys) for one in made] == [10]


def test_an_answer_ends_with_its_end_token(model, ids):
    prompts, tokens = cut_prompts(ids, WINDOW)
    free = greedy_answers(model, prompts, tokens)
    end = int(free[0, 3])
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [end, 257]
    try:
        found = greedy_answers(model, prompts, tokens)
    finally:
        model.generation_config.eos_token_id = before
    first = free[0].tolist().index(end)
    assert found[0, : first + 1].tolist() == free[0, : first + 1].tolist()
    assert (found[0, first + 1 :] == -1).all()


def test_prompts_lie_all_over_the_text_and_fit_the_window():
    prompts, tokens = cut_prompts(torch.arange(24 * 1024), 1024)
    assert (tuple(prompts.shape), tokens) == ((32, 32), 32)
    assert prompts[:, 0].tolist() == list(range(0, 24 * 1024, 768))
    assert torch.equal(prompts[3], torch.arange(3 * 768, 3 * 768 + 32))
    prompts, tokens = cut_prompts(torch.arange(40), 40)
    assert prompts.tolist() == [list(range(20)), list(range(20, 40))]
    assert tokens == 20


def test_shares_of_changed_answers():
    before = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [1, 9, -1, -1], [3, 9, -1, -1], [4, 9, -1, -1]])
    after = torch.tensor([[1, 2, 3, 4], [5, 0, 7, 8], [1, 9, -1, -1], [3, 3, 3, 9], [5, 9, -1, -1]])
    found = compare_answers(before, after)
    assert (found.prompts, found.tokens) == (5, 4)
    assert found.changed_answers == 3 / 5
    # The second is another from its second token on, the fourth too, which has four tokens in one of the models; the
    # third and the last have two.
    assert found.changed_tokens == (3 + 3 + 2) / (4 + 4 + 2 + 4 + 2)
