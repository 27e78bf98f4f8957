"""Ranking of heads, and how many of them a budget of bytes holds."""

from dataclasses import replace

import pytest
import torch
from compress.calibrate.errors import InputError
from models import build_model
from transformers import PreTrainedConfig

from compress.heads.select import Budget, dense_bytes, how_many, rank, stored_bytes, streaming_plan
from compress.plan import AttentionPlan, Window
from compress.plan_compile import predict_bytes
from compress.plan_writer import Rule

RULE = Rule(16, Window(64, 0.0))
WAY = Budget(0.5, 1024, RULE)


@pytest.fixture(scope="module")
def config() -> PreTrainedConfig:
    return build_model("llama_untied").config  # 3 layers, 4 KV heads of 12


@pytest.fixture(scope="module")
def hybrid() -> PreTrainedConfig:
    return build_model("qwen2").config  # layers 1 and 2 slide


# Ranking


def test_all_layers_are_ranked_together() -> None:
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.7], [0.2, 0.3]])
    assert rank(scores, (0, 1, 2)).heads == ((0, 1), (1, 0), (1, 1), (2, 1), (2, 0), (0, 0))
    assert rank(scores, (0, 2)).heads == ((0, 1), (2, 1), (2, 0), (0, 0))


def test_ties_go_by_the_second_score_then_by_number() -> None:
    scores = torch.tensor([[1.0, 1.0], [1.0, 0.5], [0.5, 0.5]])
    second = torch.tensor([[0.0, 2.0], [1.0, 3.0], [3.0, 4.0]])
    assert rank(scores, (0, 1, 2), second).heads == ((0, 1), (1, 0), (0, 0), (2, 1), (2, 0), (1, 1))
    assert rank(scores, (0, 1, 2)).heads == ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (2, 1))


def test_saturated_scores_are_not_told_apart() -> None:
    """Gates of 0.998 and 1 differ by noise: the second score knows better."""
    scores, second = torch.tensor([[1.0, 0.998], [0.9, 0.996]]), torch.tensor([[1.0, 3.0], [9.0, 2.0]])
    assert rank(scores, (0, 1), second).heads[0] == (0, 0)
    assert rank(scores, (0, 1), second, step=0.01).heads == ((0, 1), (1, 1), (0, 0), (1, 0))


def test_equal_scores_are_told_and_fall_back() -> None:
    even, second = torch.ones(2, 2), torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    found = rank(even, (0, 1), second)
    assert found.heads == ((1, 1), (1, 0), (0, 1), (0, 0))
    assert "equal" in found.notes[0]
    assert "second score instead" in found.notes[0]
    for other in (None, even):
        found = rank(even, (0, 1), other)
        assert "order of their numbers" in found.notes[0]
        assert found.heads == ((0, 0), (1, 0), (0, 1), (1, 1))
    assert rank(second, (0, 1)).notes == ()


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        rank(torch.tensor([[1.0, float("nan")]]), (0,))
    rank(torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]), (0,))  # of a sliding layer, which nobody reads


# Plans and bytes


def test_heads_that_are_not_kept_stream(config: PreTrainedConfig) -> None:
    plan = streaming_plan(config, RULE, ((0, 1), (2, 0), (2, 1), (2, 2), (2, 3)))
    kinds = [[head.kind for head in layer.heads] for layer in plan.layers]
    assert kinds == [["stream", "full", "stream", "stream"], ["stream"] * 4, ["full"] * 4]
    assert {(head.sink, head.window) for layer in plan.layers for head in layer.heads if head.kind == "stream"} == {
        (16, Window(64, 0.0))
    }
    assert set(plan.writers) == {"window"}


def test_sliding_layers_are_left_alone(hybrid: PreTrainedConfig) -> None:
    plan = streaming_plan(hybrid, RULE, ())
    assert [{head.kind for head in layer.heads} for layer in plan.layers] == [{"stream"}, {"full"}, {"full"}]
    assert how_many(hybrid, replace(WAY, retention=1.0)) == 2


def test_keeping_everything_is_the_empty_plan(config: PreTrainedConfig) -> None:
    keep = tuple((layer, head) for layer in range(3) for head in range(4))
    assert streaming_plan(config, RULE, keep).layers == AttentionPlan.empty(config).layers
    assert how_many(config, replace(WAY, retention=1.0)) == 12


def test_bytes_are_those_of_full_heads_and_of_sinks_and_windows(config: PreTrainedConfig) -> None:
    each = 2 * 2 * 12  # keys and values of a head of 12 in 16 bits
    assert dense_bytes(config, 1024) == 12 * 1024 * each
    assert stored_bytes(config, WAY, ((0, 0), (1, 1))) == (2 * 1024 + 10 * 80) * each
    plan = streaming_plan(config, RULE, ((0, 0), (1, 1)))
    assert predict_bytes(plan, config, 1024).stored == stored_bytes(config, WAY, ((0, 0), (1, 1)))


@pytest.mark.parametrize("retention", [0.079, 0.2, 0.35, 0.5, 0.77, 0.999, 1.0])
@pytest.mark.parametrize("tokens", [1024, 5000])
def test_as_many_heads_as_the_budget_holds(config: PreTrainedConfig, retention: float, tokens: int) -> None:
    budget = Budget(retention, tokens, RULE)
    count = how_many(config, budget)
    heads = [(layer, head) for layer in range(3) for head in range(4)]
    limit = retention * dense_bytes(config, tokens)
    assert stored_bytes(config, budget, tuple(heads[:count])) <= limit
    assert count == 12 or stored_bytes(config, budget, tuple(heads[: count + 1])) > limit


def test_a_budget_that_no_plan_meets_names_the_nearest(config: PreTrainedConfig) -> None:
    with pytest.raises(InputError) as caught:
        how_many(config, replace(WAY, retention=0.05))
    text = str(caught.value)
    assert "heads.retention" in text
    assert "7.8%" in text  # 80 of 1024 tokens
    assert "from 0.079" in text
    assert how_many(config, replace(WAY, retention=0.079)) == 0
