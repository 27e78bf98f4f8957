"""Long-context questions: their size, their needles, their scores, with a byte tokenizer and one that has words."""

import re
from pathlib import Path

import pytest
from compress.calibrate.errors import InputError
from compress.evalsuite import catalogue
from compress.evalsuite.longcontext import (
    TASKS,
    LongContextSettings,
    check_long_context,
    grid,
    long_context,
    prepare,
    results,
    run,
    store,
)
from compress.evalsuite.longcontext.prompts import PLACED, SPREAD, Item, make_items, token_ids
from compress.evalsuite.longcontext.run import string_match_all
from compress.evalsuite.longcontext.vocabulary import ADJECTIVES, NOISE, NOUNS
from eval_builders import make_model, make_tokenizer
from reader import Reader, read
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

ESSAY = "".join(f"Sentence {n} of an essay tells of {n * n} things. " for n in range(300))
ESSAY_WORDS = ESSAY.split()
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
    backend.train_from_iterator([ESSAY, NOISE], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(store, "default_cache_dir", lambda: tmp_path / "prompts")
    return tmp_path / "prompts"


def size(tokenizer: PreTrainedTokenizerFast, item: Item) -> int:
    return len(tokenizer(item.prompt)["input_ids"]) + item.room


def test_the_names_are_those_of_the_catalogue_and_each_has_a_maker() -> None:
    assert TASKS == catalogue.LONG_CONTEXT
    assert sorted(TASKS) == sorted([*PLACED, *SPREAD])


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", ["bytes", "words"])
def test_prompts_fill_their_length_and_hold_the_answers(task: str, kind: str, words: PreTrainedTokenizerFast) -> None:
    tokenizer = words if kind == "words" else make_tokenizer()
    length = 4000 if kind == "bytes" else 2000
    items = make_items(task, tokenizer, LongContextSettings(lengths=(length,), depths=2), ESSAY_WORDS)
    assert len(items) == 2
    for item in items:
        # A needle of two UUIDs is itself 5 % of the shorter prompt.
        assert (0.93 if task == "niah_multikey_3" else 0.98) * length < size(tokenizer, item) <= length
        assert all(answer in item.prompt for answer in item.answers)
        assert item.room >= len(tokenizer(", ".join(item.answers))["input_ids"])


@pytest.mark.parametrize("task", sorted(PLACED))
def test_the_needle_is_at_its_depth(task: str, words: PreTrainedTokenizerFast) -> None:
    found = make_items(task, words, LongContextSettings(lengths=(2500,), depths=5), ESSAY_WORDS)
    assert [item.depth for item in found] == [0.0, 0.25, 0.5, 0.75, 1.0]
    for item in found:
        body = "\n\n".join(item.prompt.split("\n\n")[1:-1])
        middle = body.index(item.answers[0]) + len(item.answers[0]) / 2
        assert abs(middle / len(body) - item.depth) < 0.06


@pytest.mark.parametrize("task", sorted(SPREAD))
def test_tasks_with_spread_answers_have_no_depth(task: str, words: PreTrainedTokenizerFast) -> None:
    items = make_items(task, words, SETTINGS, ESSAY_WORDS)
    assert [item.depth for item in items] == [None] * 3
    assert len({item.prompt for item in items}) == 3


def test_the_seed_decides_everything(words: PreTrainedTokenizerFast) -> None:
    first = make_items("niah_multiquery", words, SETTINGS, ESSAY_WORDS)
    assert first == make_items("niah_multiquery", words, SETTINGS, ESSAY_WORDS)
    other = LongContextSettings(lengths=(1500,), depths=3, seed=1)
    assert {item.answers for item in first}.isdisjoint(
        item.answers for item in make_items("niah_multiquery", words, other, ESSAY_WORDS)
    )


def test_the_haystack_is_the_text_given_or_else_the_repeated_sentences(words: PreTrainedTokenizerFast) -> None:
    given, none, blank = (prepare(["niah_single_2"], words, SETTINGS, text)[0].prompt for text in (ESSAY, None, " \n"))
    assert "of an essay tells" in given
    assert "The grass is green." not in given
    assert "The grass is green." in none
    assert blank == none
    short = prepare(["niah_single_2"], words, SETTINGS, "A short text. ")[0]
    assert short.prompt.count("A short text.") > 100
    assert size(words, short) > 0.98 * 1500


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
        make_items(task, words, LongContextSettings(lengths=(20,), depths=3), ESSAY_WORDS)
    least = int(re.findall(r"(\d+) or more", str(error.value))[0])
    settings = LongContextSettings(lengths=(least,), depths=3)
    assert all(size(words, item) <= least for item in make_items(task, words, settings, ESSAY_WORDS))
    with pytest.raises(InputError):
        make_items(task, words, LongContextSettings(lengths=(least - 1,), depths=3), ESSAY_WORDS)


@pytest.mark.parametrize("length", [1, 64, 300, 512])
def test_short_lengths_end_with_a_prompt_or_an_error(length: int) -> None:
    tokenizer = make_tokenizer()
    settings = LongContextSettings(lengths=(length,), depths=1)
    for task in TASKS:
        try:
            assert size(tokenizer, make_items(task, tokenizer, settings, ESSAY_WORDS)[0]) <= length
        except InputError as error:
            refused = (error.option, int(str(error.allowed).split()[0]))
            least = LongContextSettings(lengths=refused[1:], depths=1)
            make_items(task, tokenizer, least, ESSAY_WORDS)


def test_a_tokenizer_that_makes_nothing_of_text_does_not_hang() -> None:
    backend = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))  # the whole text is one unknown token
    items = make_items("passkey", PreTrainedTokenizerFast(tokenizer_object=backend), SETTINGS, None)
    assert len(items) == 3
    assert all(len(item.prompt) < 100_000 for item in items)


def test_the_end_token_that_a_tokenizer_adds_is_left_out() -> None:
    plain, ended = make_tokenizer(), make_tokenizer()
    ended.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    assert ended("a")["input_ids"] == [256, *plain("a")["input_ids"], 257]
    assert token_ids(ended, "a") == [256, *plain("a")["input_ids"]]


def test_no_word_is_part_of_another() -> None:
    every = [*ADJECTIVES, *NOUNS]
    assert len(set(every)) == len(every)
    assert [(one, other) for one in every for other in every if one != other and one in other] == []


def test_prompts_are_kept_and_made_again_when_damaged(
    words: PreTrainedTokenizerFast, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepare(["passkey"], words, SETTINGS)
    (file,) = cache_folder.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(store, "make_items", lambda *_: pytest.fail("made again"))
        assert prepare(["passkey"], words, SETTINGS) == made
    file.write_text(file.read_text().replace("The pass key is", "The pass key was"))
    assert prepare(["passkey"], words, SETTINGS) == made
    file.write_text(file.read_text()[:-9])
    assert prepare(["passkey"], words, SETTINGS) == made
    assert list(cache_folder.iterdir()) == [file]


@pytest.mark.parametrize("change", ["tokenizer", "task", "length", "depths", "samples", "seed", "haystack"])
def test_other_prompts_are_kept_apart(change: str, words: PreTrainedTokenizerFast, cache_folder: Path) -> None:
    prepare(["passkey"], words, SETTINGS)
    tokenizer = make_tokenizer() if change == "tokenizer" else words
    task = "niah_single_1" if change == "task" else "passkey"
    settings = {"lengths": (1500,), "depths": 3}
    settings |= {"length": {"lengths": (1500, 1600)}}.get(change, {})
    settings |= {change: 2} if change in ("depths", "samples", "seed") else {}
    prepare([task], tokenizer, LongContextSettings(**settings), ESSAY if change == "haystack" else None)
    assert len(list(cache_folder.iterdir())) == 2


def test_a_folder_that_cannot_be_written_to_costs_only_time(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert len(prepare(["passkey"], words, SETTINGS, cache_dir=tmp_path / "file")) == 3


@pytest.mark.parametrize("task", sorted(PLACED))
def test_a_model_that_reads_scores_one_and_one_that_guesses_nothing(task: str) -> None:
    tokenizer = make_tokenizer()
    settings = LongContextSettings(lengths=(2000, 5000), depths=2, samples=2)
    cells = long_context(Reader(tokenizer), tokenizer, [task, task], settings, ESSAY)
    assert [(cell.length, cell.depth, cell.score, cell.n) for cell in cells] == [
        (length, depth, 1.0, 2) for length in (2000, 5000) for depth in (0.0, 1.0)
    ]
    assert all(answer.given == answer.expected[0] for cell in cells for answer in cell.answers)
    assert grid(cells)[0] == {"task": task, "length": 2000, "depth": 0.0, "score": 1.0, "n": 2}
    guesser = Reader(tokenizer, lambda prompt: read(prompt) and " something or other")
    wrong = results(long_context(guesser, tokenizer, [task], settings, ESSAY))
    assert [(result.task, result.length, result.score, result.stderr) for result in wrong] == [
        (task, 2000, 0.0, 0.0),
        (task, 5000, 0.0, 0.0),
    ]


@pytest.mark.parametrize("task", TASKS)
def test_there_is_room_for_all_that_is_expected(task: str) -> None:
    tokenizer, settings = make_tokenizer(), LongContextSettings(lengths=(3000,), depths=2)
    wanted = {item.prompt: item.answers for item in prepare([task], tokenizer, settings, ESSAY)}
    model = Reader(tokenizer, lambda prompt: f" {', '.join(wanted[prompt])}." + " and so on" * 99)
    cells = long_context(model, tokenizer, [task], settings, ESSAY)
    assert [cell.score for cell in cells] == [1.0] * len(cells)
    assert all(len(answer.given) < 2 * len(", ".join(answer.expected)) + 9 for cell in cells for answer in cell.answers)


def test_the_score_of_a_length_is_the_mean_of_its_questions_with_its_error() -> None:
    tokenizer = make_tokenizer()
    lengths = LongContextSettings(lengths=(1500, 1600), depths=4)

    def short_sighted(prompt: str) -> str:
        found = read(prompt)
        return found if found is not None and prompt.index(found) < 750 else "?"

    first, second = results(long_context(Reader(tokenizer, short_sighted), tokenizer, ["passkey"], lengths))
    assert (first.task, first.length, first.score, first.scores) == ("passkey", 1500, 0.5, (1.0, 1.0, 0.0, 0.0))
    assert first.stderr == pytest.approx((1 / 3) ** 0.5 / 2)
    assert (second.length, second.score) == (1600, 0.5)
    one = LongContextSettings(lengths=(1500,), depths=1)
    (single,) = results(long_context(Reader(tokenizer), tokenizer, ["passkey"], one))
    assert (single.score, single.stderr) == (1.0, None)


@pytest.mark.parametrize("chunk", [100, 4096])
def test_answers_are_those_of_generate_and_the_cache_is_at_work(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "CHUNK", chunk)
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
    for cell, item in zip(cells, prepare(["passkey"], tokenizer, settings), strict=True):
        ids = tokenizer(item.prompt, return_tensors="pt").input_ids
        said = model.eval().generate(ids, max_new_tokens=item.room, do_sample=False)[0, ids.shape[1] :]
        assert cell.answers[0].given == tokenizer.decode(said, skip_special_tokens=True)
        assert all(kept.get_seq_length() >= ids.shape[1] for kept in made)
    assert cells == long_context(model, tokenizer, ["passkey"], settings)


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
        (["passkey"], LongContextSettings(lengths=(512, 512)), "eval.lengths=512: is named twice"),
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
