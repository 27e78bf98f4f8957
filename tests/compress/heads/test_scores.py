"""Scores of heads against attention matrices written out, on models whose heads are known."""

import pytest
import torch
from compress.calibrate.errors import InputError
from models import build_model, build_tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from compress.heads import rows as rows_module
from compress.heads.data import Asked, Item, text_windows
from compress.heads.mean_qk import POSITIONS, mean_qk_scores
from compress.heads.retrieval import GIVEN, recall, retrieval_scores
from compress.heads.rows import by_kv_head
from compress.heads.scores import NAMES, ScoreSettings, mean_rank, score
from compress.heads.sinks import sink_rate
from compress.tap import Seen

SETTINGS = ScoreSettings(lengths=(448,), words=2, random_tokens=96, observed=16, recent=32)


def matrices(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """All attention probabilities of a sequence ``[layers, heads, T, T]``, by transformers' own eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = torch.stack(model(ids[None], output_attentions=True).attentions)[:, 0]
    model.set_attn_implementation(before)
    return found


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build_model("llama")


@pytest.fixture(params=[1 << 22, 1])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows at once, and one by one."""
    monkeypatch.setattr(rows_module, "BLOCK_ELEMENTS", request.param)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("name", "ahead"), [("echo", 0), ("induction", 1)])
def test_scores_on_copies_are_masses_of_the_matrix(llama: PreTrainedModel, name: str, ahead: int) -> None:
    seen: list[Tensor] = []
    handle = llama.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"][0]), with_kwargs=True
    )
    found = score(name, llama, build_tokenizer(), SETTINGS)
    handle.remove()
    (ids,) = seen
    assert len(ids) == 96
    assert ids[:24].equal(ids[72:])
    assert len(set(ids[:24].tolist())) > 12
    mass = matrices(llama, ids)
    expected = torch.zeros(mass.shape[:2])
    for row in range(24, 96):
        for copy in range(row - 24, -1, -24):
            expected += mass[:, :, row, copy + ahead]
    torch.testing.assert_close(found, by_kv_head(expected / 72, 2))


@pytest.mark.usefixtures("blocks")
def test_distant_mass_is_what_sink_and_window_leave_out(llama: PreTrainedModel) -> None:
    tokenizer = build_tokenizer()
    (item,) = SETTINGS.items(tokenizer)
    mass = matrices(llama, item.ids)
    length = len(item.ids)
    row, key = torch.arange(length)[:, None], torch.arange(length)
    far = (key >= 4) & (key <= row - 32)
    expected = (mass * far)[:, :, -16:].sum(-1).mean(-1)
    torch.testing.assert_close(score("distant", llama, tokenizer, SETTINGS), by_kv_head(expected, 2))


def test_probabilities_come_in_blocks_that_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "BLOCK_ELEMENTS", 4 * 30 * 7)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 20, 8, generator=generator)
    key = torch.randn(1, 2, 30, 8, generator=generator)
    seen = Seen(0, query, key, key, 0.3, lambda: query)
    found = list(rows_module.probabilities(seen, torch.arange(11, 30)))
    assert [rows.tolist() for rows, _ in found] == [list(range(11, 18)), list(range(18, 25)), list(range(25, 30))]
    scores = 0.3 * query[0, :, 1:] @ key[0].repeat_interleave(2, 0).transpose(1, 2)
    hidden = torch.arange(30) > torch.arange(11, 30)[:, None]
    expected = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    for rows, mass in found:
        assert mass.numel() <= 4 * 30 * 7
        torch.testing.assert_close(mass, expected[:, rows - 11, : mass.shape[2]])


def test_a_group_has_the_largest_score_of_its_query_heads() -> None:
    assert by_kv_head(torch.tensor([[1.0, 5.0, 2.0, 3.0, 4.0, 0.0]]), 2).tolist() == [[5.0, 4.0]]


def by_hand(model: PreTrainedModel, item: Item) -> Tensor:
    """The retrieval score of one item ``[layers, heads]``, token by token without a cache."""
    found = torch.zeros(3, 6)
    for asked in item.asked:
        ids = torch.cat([item.ids[: item.context], item.ids[asked.question : asked.answer[0] + GIVEN]])
        start, stop = asked.needle
        for _ in range(stop - start - GIVEN):
            said = model(ids[None]).logits[0, -1].argmax()
            best = matrices(model, ids)[:, :, -1].argmax(-1)
            found += ((best >= start) & (best < stop) & (ids[best] == said)) / (stop - start - GIVEN)
            ids = torch.cat([ids, said[None]])
    return found / len(item.asked)


def planted(token: int, seed: int = 0) -> Item:
    """Two needles that are one token again and again, and questions about them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 300, (48,), generator=generator)
    ids[2:14] = ids[16:28] = token
    asked = (Asked(32, (36, 48), (16, 28)), Asked(33, (35, 47), (2, 14)))
    return Item(ids, torch.zeros(48, dtype=torch.bool), "passkey", 32, asked)


def test_retrieval_counts_hits_while_answering(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = build_tokenizer()
    with pytest.raises(InputError, match="found none of 2 pass phrases"):
        retrieval_scores(llama, tokenizer, [planted(5)])
    monkeypatch.setattr("compress.heads.retrieval.RECALL", -1.0)
    parrot = build_model("llama")
    parrot.model.norm.weight.data.zero_()  # all logits are equal, and it always says token 0
    items = [planted(0), planted(0, seed=1)]
    expected = (by_hand(parrot, items[0]) + by_hand(parrot, items[1])) / 2
    assert expected.unique().numel() > 3
    torch.testing.assert_close(retrieval_scores(parrot, tokenizer, items), by_kv_head(expected, 2))
    assert (retrieval_scores(parrot, tokenizer, [planted(1)]) == 0).all()


def test_an_answer_that_the_model_ends_goes_no_further(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.heads.retrieval.RECALL", -1.0)
    monkeypatch.setattr(llama.generation_config, "eos_token_id", list(range(300)))
    lengths: list[int] = []
    handle = llama.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    retrieval_scores(llama, build_tokenizer(), [planted(35)])
    handle.remove()
    assert lengths == [32, 5, 1, 3, 1]  # text, and for each question what stands before its last token, and that one


def test_only_answers_that_hold_the_needle_count() -> None:
    assert recall("alpha bravo alpha echo", "so: echo alpha zulu") == 0.5
    assert recall("alpha", "alpha alpha") == 1


def test_mean_qk_of_a_uniform_head_is_a_half_and_norms_count() -> None:
    windows = text_windows(build_tokenizer(), [64, 64])
    model = build_model("qwen3")
    found = mean_qk_scores(model, windows)
    assert ((found > 0) & (found < 1)).all()
    for layer in model.model.layers:
        layer.self_attn.k_norm.weight.data.zero_()
    torch.testing.assert_close(mean_qk_scores(model, windows), torch.full((3, 1), (POSITIONS + 1) / (2 * POSITIONS)))


def test_mean_qk_averages_before_rotary_embedding(llama: PreTrainedModel) -> None:
    """Against queries and keys taken from the projections."""
    (ids,) = text_windows(build_tokenizer(), [40])
    states: list[Tensor] = []
    attention = llama.model.layers[1].self_attn
    handle = attention.register_forward_pre_hook(
        lambda _, args, kwargs: states.append(kwargs["hidden_states"]), with_kwargs=True
    )
    found = mean_qk_scores(llama, [ids])[1]
    handle.remove()
    query, key = (p(states[0]).mean(1).detach() for p in (attention.q_proj, attention.k_proj))
    cos, sin = llama.model.rotary_emb(query[None], torch.arange(POSITIONS)[None])

    def turned(x: Tensor) -> Tensor:
        x = x.view(-1, 1, 16)
        return x * cos + torch.cat([-x[..., 8:], x[..., :8]], -1) * sin

    scores = turned(query)[:, -1:] @ turned(key).repeat_interleave(3, 0).transpose(1, 2) / 4
    areas = scores.softmax(-1).cumsum(-1).mean((1, 2)).view(2, 3).mean(1)
    torch.testing.assert_close(found, areas, rtol=1e-3, atol=1e-4)


def test_layers_with_a_window_of_their_own_have_no_score() -> None:
    model = build_model("qwen2", layer_types=["full_attention", "sliding_attention", "full_attention"])
    for name in ("echo", "distant", "mean_qk"):
        found = score(name, model, build_tokenizer(), SETTINGS)
        assert (found[1] == 0).all(), name
        assert (found[[0, 2]] > 0).all(), name


def test_the_model_is_left_as_it_was(llama: PreTrainedModel) -> None:
    before = llama.config._attn_implementation
    llama.train()
    try:
        score("echo", llama, build_tokenizer(), SETTINGS)
        assert llama.training
        assert llama.config._attn_implementation == before
        assert all(parameter.requires_grad for parameter in llama.parameters())
    finally:
        llama.eval()


def test_bad_names_and_lengths_are_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(InputError, match=r"heads.score=ecko: .*did you mean 'echo'"):
        score("ecko", llama, build_tokenizer(), SETTINGS)
    for name in NAMES:
        with pytest.raises(InputError, match=r"heads.lengths=1024: .*at most 512"):
            score(name, llama, build_tokenizer(), ScoreSettings(lengths=(1024,)))


def test_sink_rate_counts_heads_that_rest_on_the_first_token(llama: PreTrainedModel) -> None:
    ids = torch.randint(0, 300, (4, 64), generator=torch.Generator().manual_seed(0))
    rests = torch.stack([matrices(llama, sequence)[:, :, :, 0].mean(-1) for sequence in ids])
    threshold = float(rests.median())
    expected = 100 * (rests > threshold).float().mean()
    assert 0 < expected < 100
    assert sink_rate(llama, [ids[:1], ids[1:]], threshold) == pytest.approx(float(expected), abs=1.5)
    assert sink_rate(llama, [ids], 0.0) == 100
    assert sink_rate(llama, [ids], 1.0) == 0


def test_the_mean_rank_counts_scores_of_any_unit_alike() -> None:
    one = torch.tensor([[0.1, 0.4], [0.2, 0.3]])
    other = torch.tensor([[5e6, 2e6], [5e6, 1e6]])  # two alike: rank 3.5 each
    found = mean_rank(one, other)
    torch.testing.assert_close(found, torch.tensor([[(1 + 3.5) / 8, (4 + 2) / 8], [(2 + 3.5) / 8, (3 + 1) / 8]]))
    torch.testing.assert_close(mean_rank(one * 7, other.log()), found)
