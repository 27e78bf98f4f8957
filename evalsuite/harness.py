"""The bridge to lm-eval: its tasks, its scoring and its result schema, on a model that is already loaded.

lm-eval itself is imported when tasks are loaded, not before: that costs seconds.
"""

import copy
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compress.calibrate.errors import InputError
from compress.calibrate.hub import hub_problem
from compress.evalsuite.catalogue import PERPLEXITY, Selection, select_tasks, validate_tasks
from compress.evalsuite.head import CacheFactory
from compress.evalsuite.items import TaskItems, task_items
from compress.evalsuite.quiet import quiet, seeded, single_process, templates_kept, weights_untouched
from compress.evalsuite.settings import EvalSettings
from compress.evalsuite.task_errors import blamed_on, check_examples, guard, try_documents, try_first_document
from compress.evalsuite.task_folder import absolute_data_files

_OFFLINE = "connect to the Hugging Face Hub, or give a task folder with local data (--task-path)"

__all__ = ["Evaluated", "Samples", "evaluate_items", "evaluate_tasks", "load_tasks", "validate_tasks"]


Samples = dict[str, list[dict[str, Any]]]
"""What lm-eval logs for each document and filter, by name of the task."""


@dataclass(frozen=True)
class Evaluated:
    """What lm-eval found.

    Attributes:
        results: its ``EvalResults`` as plain JSON types, without samples.
        items: the figures of each document, by name of the task.
        samples: what it logs.
    """

    results: dict[str, Any]
    items: dict[str, TaskItems]
    samples: Samples


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    settings: EvalSettings | None = None,
    cache: CacheFactory | None = None,
) -> dict[str, Any]:
    """Run lm-eval tasks on a loaded model.

    Args:
        model: a transformers causal language model; neither its weights nor its mode are changed.
        tokenizer: its tokenizer; a copy is used.
        tasks: names of lm-eval tasks, groups or tags.
        settings: limit, few-shot examples, chat template, batch size, task folder.
        cache: makes the ``past_key_values`` of each question and each generated text; None for the model's own.

    Returns:
        lm-eval's ``EvalResults`` (results, groups, configs, versions, n-shot, higher_is_better, n-samples, config, …),
        made of plain JSON types, without samples.

    Raises:
        InputError: a task doesn't exist, its data can't be had, or it doesn't fit the model.
    """
    return evaluate_items(model, tokenizer, tasks, settings, cache).results


def evaluate_items(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    settings: EvalSettings | None = None,
    cache: CacheFactory | None = None,
    loaded: dict[str, Any] | None = None,
) -> Evaluated:
    """Like ``evaluate_tasks``, with what each task found for each document.

    Args:
        model: as there, and so on.
        tokenizer: its tokenizer.
        tasks: names.
        settings: how.
        cache: makes caches.
        loaded: what ``load_tasks`` gave for these tasks and settings, which may be used again; None loads them.
    """
    settings = settings or EvalSettings()
    if settings.apply_chat_template and not getattr(tokenizer, "chat_template", None):
        raise InputError("eval.apply_chat_template", True, "the model has no chat template")
    loaded = load_tasks(tasks, settings) if loaded is None else loaded
    from compress.evalsuite.bridge import LoadedModel
    from lm_eval import evaluator
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.utils import handle_non_serializable

    started, streams = time.time(), (sys.stdout, sys.stderr)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)  # the same examples each time
    with quiet(), seeded(), single_process(), templates_kept(), weights_untouched(model):
        lm = LoadedModel(model, copy.deepcopy(tokenizer), settings, streams, cache)
        results = evaluator.evaluate(
            lm,
            loaded,
            limit=settings.limit,
            bootstrap_iters=settings.bootstrap_iters,
            system_instruction=settings.system_instruction,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.apply_chat_template and settings.fewshot_as_multiturn,
        )
    samples: Samples = results.pop("samples")
    results |= _provenance(model, lm, settings, started)
    plain = json.loads(json.dumps(results, default=handle_non_serializable))
    return Evaluated(plain, {name: task_items(found) for name, found in samples.items()}, samples)


def load_tasks(tasks: Sequence[str], settings: EvalSettings) -> dict[str, Any]:
    """Load tasks and their data, without a model: what fails here need not wait for one.

    Args:
        tasks: names of lm-eval tasks, groups or tags.
        settings: task folder, few-shot examples, limit.

    Returns:
        lm-eval's ``TaskDict``: tasks and groups by name, and each group's members.

    Raises:
        InputError: a task doesn't exist; its data is missing, unreadable or out of reach; the task file doesn't fit
            its data, as far as documents without a model's answers show; there are too few documents for the examples
            asked for; it runs generated code.
    """
    wanted = [name for name in tasks if name != PERPLEXITY]
    selection = select_tasks(wanted, settings.task_path)
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    out: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    with quiet(), seeded(), templates_kept():
        manager = _task_manager(selection)
        _check_reachable(manager, selection)
        for name in wanted:
            for key, found in _load_one(manager, selection, name).items():
                out[key] |= {part: value for part, value in found.items() if part not in out[key]}
        for name, task in out["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise InputError("eval.tasks", name, "the task runs code that the model writes, which is not allowed")
            if getattr(task, "MULTIMODAL", False):
                raise InputError("eval.tasks", name, "the task shows images or sound, which a text model cannot take")
            default = task.get_config("num_fewshot")
            # A task that sets zero examples itself means it, as in lm-eval's own command.
            if default is None or (settings.num_fewshot is not None and default != 0):
                task.set_config(key="num_fewshot", value=settings.num_fewshot or 0)
                check_examples(task, name)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
            try_first_document(task, name, selection.file(name), settings.system_instruction)
            try_documents(task, name, selection.file(name), settings.limit)
            guard(task, name, selection.file(name))
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)  # as if no examples had been drawn yet
    return out


def _task_manager(selection: Selection) -> Any:
    """A TaskManager that has indexed only the folders in use, with the data files of local tasks made absolute."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    # lm-eval lets later folders win: the user's come last.
    folders = [
        *_outermost(path.parent for path in selection.builtin.values()),
        *_outermost(file.path.parent for file in selection.local.values()),
    ]
    manager = TaskManager(include_path=folders or None, include_defaults=False)
    for tag, members in selection.tags.items():
        # Of a tag whose tasks lie in several folders, the index only holds the last folder's.
        manager.task_index[tag].tags |= members
    for name, file in selection.local.items():
        if file.data_files:
            entry = manager.task_index[name]
            with blamed_on(name, file.path):
                entry.cfg = absolute_data_files(load_yaml(file.path), file.data_folder)
            entry.yaml_path = None
    return manager


def _check_reachable(manager: Any, selection: Selection) -> None:
    """Find in seconds that a Hub dataset can't be had; datasets itself tries again for 23 s, for each task."""
    from datasets import config
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    for name in (*selection.builtin, *selection.local):
        task = manager.task_index[name].cfg or {}
        dataset = task.get("dataset_path")
        if not isinstance(dataset, str) or dataset in ("", *_PACKAGED_DATASETS_MODULES) or "custom_dataset" in task:
            continue
        if Path(dataset).exists() or Path(config.HF_DATASETS_CACHE, dataset.replace("/", "___")).is_dir():
            continue
        problem = hub_problem()
        if problem is None:
            return
        problem = f"{problem}, and this machine holds no copy of its dataset {dataset}"
        raise InputError("eval.tasks", name, problem, fix=_OFFLINE)


def _outermost(folders: Iterable[Path]) -> list[Path]:
    """Folders that don't lie below another one of them, in order."""
    every = set(folders)
    return sorted(folder for folder in every if every.isdisjoint(folder.parents))


def _load_one(manager: Any, selection: Selection, name: str) -> dict[str, Any]:
    """Build one task, group or tag, and load its data."""
    try:
        with blamed_on(name, selection.file(name)):
            return _load_data(manager, name)
    except InputError:
        for member in selection.members(name):  # one of them is to blame, and is named
            _load_one(manager, selection, member)
        raise


def _load_data(manager: Any, name: str) -> dict[str, Any]:
    from datasets.exceptions import DatasetsError

    try:
        found: dict[str, Any] = manager.load([name])
    except DatasetsError as error:
        # The library's message only says that something failed; its cause says what.
        raise InputError(
            "eval.tasks", name, f"its data cannot be read: {_one_line(error.__cause__ or error)}"
        ) from error
    except OSError as error:
        dataset = (manager.task_index[name].cfg or {}).get("dataset_path")
        raise InputError(
            "eval.tasks",
            name,
            f"its dataset {dataset or ''} is out of reach: {_one_line(error)}".replace("  ", " "),
            fix=_OFFLINE,
        ) from error
    return found


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _provenance(model: Any, lm: Any, settings: EvalSettings, started: float) -> dict[str, Any]:
    """What ``lm_eval.simple_evaluate`` adds to the results, less what it asks the shell for."""
    tokens = {
        f"tokenizer_{key}_token": [
            getattr(lm.tokenizer, f"{key}_token"),
            str(getattr(lm.tokenizer, f"{key}_token_id")),
        ]
        for key in ("pad", "eos", "bos")
    }
    return {
        "config": {
            "model": model.config.name_or_path,
            "model_num_parameters": model.num_parameters(),
            "model_dtype": str(model.dtype),
            "batch_size": settings.batch_size,
            "device": str(model.device),
            "limit": settings.limit,
            "bootstrap_iters": settings.bootstrap_iters,
            "system_instruction": settings.system_instruction,
            "apply_chat_template": settings.apply_chat_template,
            "fewshot_as_multiturn": settings.fewshot_as_multiturn,
        },
        "date": started,
        "transformers_version": version("transformers"),
        "lm_eval_version": version("lm-eval"),
        **tokens,
        "max_length": lm.max_length,
    }
