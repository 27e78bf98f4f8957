"""A method's cache factory isn't safe in several threads, and needn't be."""

import copy
from dataclasses import replace
from threading import current_thread

import pytest
import torch
from compress.evalsuite.divergence import Reference
from compress.evalsuite.longcontext import store
from compress.evalsuite.score import Material, score, tokenise
from compress.evalsuite.settings import EvalSettings
from eval_builders import TASK
from transformers import DynamicCache

SPEAK = (
    TASK.format(name="speak")
    .replace("multiple_choice", "generate_until\ngeneration_kwargs: {until: ['.'], max_gen_toks: 4}")
    .replace('doc_to_choice: "{{choices}}"\n', "")
    .replace("metric: acc", "metric: exact_match")
)


@pytest.fixture
def threads():
    """Four threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads", "dataset_cache")
@pytest.mark.parametrize(
    ("task", "count"), [("perplexity", 4), ("divergence", 4 + 1), ("passkey", 3), ("sums", 6), ("speak", 6)]
)
def test_caches_are_made_in_the_callers_thread_and_used_in_others(
    model, tokenizer, text, task_folder, tmp_path, monkeypatch, task, count
):
    monkeypatch.setattr(store, "default_cache_dir", lambda: tmp_path / "prompts")
    (task_folder / "speak.yaml").write_text(SPEAK)
    model = copy.deepcopy(model)
    model.config.max_position_embeddings = 1024
    made, used = [], set()

    class Watched(DynamicCache):
        def update(self, *args, **kwargs):
            used.add((id(self), current_thread()))
            return super().update(*args, **kwargs)

    def cache():
        made.append((Watched(), current_thread()))
        return made[-1][0]

    settings = EvalSettings(window=32, windows=4, lengths=(600,), depths=3, task_path=str(task_folder), batch_size=2)
    settings = settings.through_cache()
    material = Material(tokenise(text, tokenizer), reference=Reference(tmp_path))
    plain = score(model, tokenizer, [task], settings, material)
    found = score(model, tokenizer, [task], settings, replace(material, reference=copy.copy(material.reference)), cache)
    assert {thread for _, thread in made} == {current_thread()}
    assert len(made) == count
    assert {id(one) for one, _ in made} <= {one for one, _ in used}
    if task != "divergence":  # all greedy answers are one batch
        assert current_thread() not in {thread for _, thread in used}
    for before, after in zip(plain.metrics, found.metrics, strict=False):
        assert after.value == pytest.approx(before.value, rel=1e-4)
