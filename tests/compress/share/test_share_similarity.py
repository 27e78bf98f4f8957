"""How alike attention is, against probabilities of whole windows."""

from typing import Any

import pytest
import torch
from models import build_model
from share_cases import TWIN, made_up
from torch import Tensor

from compress.share import similarity
from compress.share.similarity import FIRST_ROW, Similarity, look
from compress.share.trial import Trial
from compress.tap import Seen


def seen_of(model: Any, ids: Tensor) -> dict[int, Seen]:
    found: dict[int, Seen] = {}
    trial = Trial(model)

    def tap(seen: Seen) -> Tensor:
        found[seen.layer] = seen
        return seen.attend()

    with trial.at_work():
        hidden = trial.view.embed(ids)
        for index in range(trial.view.count):
            hidden = trial.view.run(index, hidden, trial.view.positions(hidden), tap)
    return found


def whole(seen: Seen) -> Tensor:
    """All probabilities of a layer, [H, T, T]."""
    group = seen.query.shape[1] // seen.key.shape[1]
    scores = seen.query[0] @ seen.key[0].repeat_interleave(group, 0).transpose(1, 2) * seen.scaling
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1)


def looked(model: Any, seen: dict[int, Seen]) -> Similarity:
    outputs = {index: model.model.layers[index].self_attn.o_proj.weight for index in seen}
    found = Similarity.empty(len(model.model.layers), model.config.num_attention_heads)
    look(found, seen, outputs, torch.Generator().manual_seed(0))
    return Similarity(found.cosine, found.overlap, found.change, found.output, 1)


@pytest.fixture
def _every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "ROWS", 10_000)
    monkeypatch.setattr(similarity, "AT_ONCE", 5_000)  # several blocks of rows


@pytest.mark.usefixtures("_every_row")
def test_figures_are_those_of_whole_matrices() -> None:
    model = build_model("llama", num_hidden_layers=3)
    seen = seen_of(model, torch.randint(4, 300, (90,), generator=torch.Generator().manual_seed(1)))
    found, p = looked(model, seen), {index: whole(one) for index, one in seen.items()}
    for layer, other in ((1, 0), (2, 0), (2, 1)):
        cosine = torch.nn.functional.cosine_similarity(p[layer].flatten(), p[other].flatten(), dim=0)
        assert float(found.cosines()[layer, other]) == pytest.approx(float(cosine), abs=1e-5)
        assert float(found.cosines()[other, layer]) == pytest.approx(float(cosine), abs=1e-5)
        weight = model.model.layers[layer].self_attn.o_proj.weight.unflatten(1, (6, -1))
        for head, theirs in ((0, 5), (4, 1), (3, 3)):
            apart = p[other][theirs, FIRST_ROW:] - p[layer][head, FIRST_ROW:]
            overlap = 1 - 0.5 * apart.abs().sum(-1).mean()
            assert float(found.overlap[layer, head, other, theirs]) == pytest.approx(float(overlap), abs=1e-5)
            change = (apart @ seen[layer].value[0, head // 3] @ weight[:, head].t()).square().sum()
            assert float(found.change[layer, head, other, theirs]) == pytest.approx(float(change), rel=1e-4)
    own = (
        p[2][1, FIRST_ROW:]
        @ seen[2].value[0, 0]
        @ model.model.layers[2].self_attn.o_proj.weight.unflatten(1, (6, -1))[:, 1].t()
    )
    assert float(found.output[2, 1]) == pytest.approx(float(own.square().sum()), rel=1e-4)


def test_heads_are_found_wherever_they_stand(twins: Any) -> None:
    found = looked(twins, seen_of(twins, made_up(1, 160, 7)[0]))
    assert found.head_map(3, 2) == TWIN
    assert found.relative_change(3, 2, TWIN) < 1e-9
    assert found.relative_change(3, 2, None) > 1e-3


def test_the_output_decides_among_heads_that_overlap_most() -> None:
    found = Similarity.empty(2, 4)
    found.overlap[1, 0, 0] = torch.tensor([0.9, 0.8, 0.7, 0.1])
    found.change[1, 0, 0] = torch.tensor([3.0, 1.0, 2.0, 0.0])  # the last one doesn't overlap
    assert found.head_map(1, 0)[0] == 1


def test_a_window_needs_rows_that_see_many_tokens() -> None:
    model = build_model("llama", num_hidden_layers=2)
    seen = seen_of(model, torch.arange(4, 4 + FIRST_ROW))
    with pytest.raises(ValueError, match="more than 64"):
        looked(model, seen)
