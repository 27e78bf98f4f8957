"""Long-context questions: their size, their needles, their scores, with a byte tokenizer and one that has words."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from compress.calibrate.errors import InputError
from compress.evalsuite import catalogue
from compress.evalsuite.longcontext import TASKS, LongContextSettings, check_long_context, grid, long_context, results
from compress.evalsuite.longcontext import prompts as prompt_files
from compress.evalsuite.longcontext.prompts import Item, cached_items, make_items
from compress.evalsuite.longcontext.run import string_match_all
from eval_builders import make_model, make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

ESSAY = "".join(f"Sentence {n} of an essay tells of {n * n} things. " for n in range(300))
SETTINGS = LongContextSettings(lengths=(1500,), depths=3)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are mostly words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([ESSAY, prompt_files.NOISE], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(prompt_files, "default_cache_dir", lambda: tmp_path / "prompts")
    return tmp_path / "prompts"


def size(tokenizer: PreTrainedTokenizerFast, item: Item) -> int:
    return len(tokenizer(item.prompt)["input_ids"]) + item.room


def test_the_names_are_those_of_the_catalogue_and_each_has_a_maker() -> None:
    assert TASKS == catalogue.LONG_CONTEXT
    assert sorted(TASKS) == sorted([*prompt_files.PLACED, *prompt_files.SPREAD])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_prompts_fill_their_length_and_hold_the_answers(task: str, kind: str, words: PreTrainedTokenizerFast) -> None:
    tokenizer = words if kind == "words" else make_tokenizer()
    length = 4000 if kind == "bytes" else 2000
    items = make_items(task, tokenizer, LongContextSettings(lengths=(length,), depths=2), ESSAY)
    assert len(items) == 2
    for item in items:
        assert 0.93 * length < size(tokenizer, item) <= length
        assert all(answer in item.prompt for answer in item.answers)
        assert item.room >= len(tokenizer(", ".join(item.answers))["input_ids"])


@pytest.mark.parametrize("task", sorted(prompt_files.PLACED))
def test_the_needle_is_at_its_depth(task: str, words: PreTrainedTokenizerFast) -> None:
    for item in make_items(task, words, LongContextSettings(lengths=(2500,), depths=5), ESSAY):
        assert item.depth is not None
        place = item.prompt.index(item.answers[0]) / len(item.prompt)
        assert abs(place - item.depth) < 0.12


@pytest.mark.parametrize("task", sorted(prompt_files.SPREAD))
def test_tasks_with_spread_answers_have_no_depth(task: str, words: PreTrainedTokenizerFast) -> None:
    items = make_items(task, words, SETTINGS, ESSAY)
    assert [item.depth for item in items] == [None] * 3
    assert len({item.prompt for item in items}) == 3


def test_the_seed_decides_everything(words: PreTrainedTokenizerFast) -> None:
    first = make_items("niah_multiquery", words, SETTINGS, ESSAY)
    assert first == make_items("niah_multiquery", words, SETTINGS, ESSAY)
    other = LongContextSettings(lengths=(1500,), depths=3, seed=1)
    assert {item.answers for item in first}.isdisjoint(
        item.answers for item in make_items("niah_multiquery", words, other, ESSAY)
    )


def test_the_haystack_is_the_text_given_or_else_the_repeated_sentences(words: PreTrainedTokenizerFast) -> None:
    given, none = (make_items("niah_single_2", words, SETTINGS, text)[0].prompt for text in (ESSAY, None))
    assert "of an essay tells" in given
    assert "The grass is green." not in given
    assert "The grass is green." in none
    assert make_items("niah_single_2", words, SETTINGS, " \n")[0].prompt == none


def test_the_variables_of_a_chain_follow_one_another(words: PreTrainedTokenizerFast) -> None:
    item = make_items("ruler_vt", words, SETTINGS, None)[0]
    asked = re.findall(r"have the value (\d+)", item.prompt)[-1]
    holders = dict(re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", item.prompt))

    def value(name: str) -> str:
        return value(holders[name]) if name in holders else name

    assert {name for name in holders if value(name) == asked} == set(item.answers)
    assert len(item.answers) == 5


@pytest.mark.parametrize(
    ("task", "pattern", "count"), [("ruler_cwe", r"\d+\. (\S+)", 10), ("ruler_fwe", r"\b([a-z]{6})\b", 3)]
)
def test_the_answers_are_the_words_that_come_most_often(
    task: str, pattern: str, count: int, words: PreTrainedTokenizerFast
) -> None:
    item = make_items(task, words, LongContextSettings(lengths=(4000,), depths=1), None)[0]
    body = item.prompt.split("\n\n")[1]
    found = re.findall(pattern, body)
    ranked = sorted(set(found), key=found.count, reverse=True)
    assert set(ranked[:count]) == set(item.answers)
    assert found.count(ranked[count - 1]) > found.count(ranked[count])


@pytest.mark.parametrize("task", TASKS)
def test_a_length_that_is_too_short_is_refused_with_the_least_that_works(
    task: str, words: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(
        InputError, match=rf"eval\.lengths=20: is too short for {task}; allowed: (\d+) or more"
    ) as error:
        make_items(task, words, LongContextSettings(lengths=(20,), depths=3), ESSAY)
    least = int(re.findall(r"(\d+) or more", str(error.value))[0])
    if task != "ruler_cwe":  # whose words come less often in shorter prompts
        assert make_items(task, words, LongContextSettings(lengths=(least,), depths=3), ESSAY)


def test_prompts_are_kept_and_made_again_when_damaged(
    words: PreTrainedTokenizerFast, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = cached_items("passkey", words, SETTINGS, None)
    (file,) = cache_folder.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(prompt_files, "make_items", lambda *_: pytest.fail("made again"))
        assert cached_items("passkey", words, SETTINGS, None) == made
    file.write_text(file.read_text().replace("The pass key is", "The pass key was"))
    assert cached_items("passkey", words, SETTINGS, None) == made
    cached_items("passkey", make_tokenizer(), SETTINGS, None)
    assert len(list(cache_folder.iterdir())) == 2


class Reader(torch.nn.Module):
    """Answers with the five digits of the pass key that it finds in its prompt; or with something else."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, honest: bool) -> None:
        super().__init__()
        self.inner = make_model(258)
        self.config, self.generation_config = self.inner.config, self.inner.generation_config
        self.config.max_position_embeddings = 8192
        self.tokenizer, self.honest, self.device = tokenizer, honest, torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, past_key_values: Any, use_cache: bool, logits_to_keep: int) -> Any:
        assert use_cache
        assert logits_to_keep == 1
        said = (past_key_values or "") + self.tokenizer.decode(input_ids[0])
        key = re.search(r"The pass key is (\d{5})\.", said)  # not yet in the first part of a long prompt
        answer = f" {key[1]}" if self.honest and key else " 00000"
        rest = answer.removeprefix(said.rpartition("The pass key is")[2])
        likeliest = self.tokenizer(rest[0])["input_ids"][0] if rest else 257
        logits = torch.zeros(1, 1, 258).index_fill(2, torch.tensor(likeliest), 1.0)
        return type("Output", (), {"logits": logits, "past_key_values": said})


def test_a_model_that_reads_scores_one_and_one_that_guesses_nothing() -> None:
    tokenizer = make_tokenizer()
    settings = LongContextSettings(lengths=(900, 6000), depths=3, samples=2)
    cells = long_context(Reader(tokenizer, honest=True), tokenizer, ["passkey"], settings)
    assert [(cell.length, cell.depth, cell.score, cell.n) for cell in cells] == [
        (length, depth, 1.0, 2) for length in (900, 6000) for depth in (0.0, 0.5, 1.0)
    ]
    assert all(answer.given == f" {answer.expected[0]}" for cell in cells for answer in cell.answers)
    assert grid(cells)[0] == {"task": "passkey", "length": 900, "depth": 0.0, "score": 1.0, "n": 2}
    wrong = results(long_context(Reader(tokenizer, honest=False), tokenizer, ["passkey"], settings))
    assert [(result.length, result.score, result.stderr) for result in wrong] == [(900, 0.0, 0.0), (6000, 0.0, 0.0)]


def test_answers_are_those_of_generate_and_the_cache_is_at_work() -> None:
    tokenizer, model = make_tokenizer(), make_model(258)
    model.config.max_position_embeddings = 1024
    made: list[DynamicCache] = []

    def cache() -> DynamicCache:
        made.append(DynamicCache())
        return made[-1]

    settings = LongContextSettings(lengths=(600,), depths=2)
    cells = long_context(model.train(), tokenizer, ["passkey"], settings, cache=cache)
    assert model.training
    assert len(made) == 2
    items = make_items("passkey", tokenizer, settings, None)
    for cell, item, kept in zip(cells, items, made, strict=True):
        ids = tokenizer(item.prompt, return_tensors="pt").input_ids
        said = model.eval().generate(ids, max_new_tokens=item.room, do_sample=False)[0, ids.shape[1] :]
        assert cell.answers[0].given == tokenizer.decode(said, skip_special_tokens=True)
        assert kept.get_seq_length() >= ids.shape[1]


def test_the_score_is_the_share_of_the_expected_strings() -> None:
    assert string_match_all("it is ABC, and 12", ["abc", "12", "34", "5"]) == 0.5


@pytest.mark.parametrize(
    ("tasks", "settings", "message"),
    [
        (["pasky"], SETTINGS, "eval.tasks=pasky: is not a long-context task.*passkey"),
        (
            ["passkey"],
            LongContextSettings(lengths=(2048, 9000)),
            "eval.lengths=9000: is beyond the model's context of 8192",
        ),
        (["passkey"], LongContextSettings(lengths=()), "eval.lengths: names no length"),
        (["passkey"], LongContextSettings(lengths=(0,)), "eval.lengths=0"),
        (["passkey"], LongContextSettings(depths=0), "eval.depths=0"),
        (["passkey"], LongContextSettings(samples=0), "eval.samples=0"),
    ],
)
def test_what_cannot_work_is_found_without_a_model(
    tasks: list[str], settings: LongContextSettings, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_long_context(tasks, settings, 8192)
    check_long_context(["passkey"], SETTINGS, None)


def test_the_model_is_asked_only_when_the_lengths_fit(model: LlamaForCausalLM) -> None:
    with pytest.raises(InputError, match=r"eval\.lengths=1500: is beyond the model's context of 256 tokens"):
        long_context(model, make_tokenizer(), ["passkey"], SETTINGS)
