"""Results as lm-eval's own command leaves them in a folder, for the tools that read these."""

import copy
import time
from pathlib import Path
from typing import Any

from compress.calibrate.errors import InputError
from compress.evalsuite.harness import Samples
from compress.evalsuite.quiet import quiet
from compress.evalsuite.scores import Metric, Scores


def write_results_folder(
    folder: Path, model: str, scores: Scores, samples: Samples | None = None, chat_template: str | None = None
) -> Path:
    """Write ``FOLDER/MODEL/results_TIME.json`` and, with samples, ``samples_TASK_TIME.jsonl`` beside it.

    The file of results is in lm-eval's schema. The figures of our own tasks are among the results too, with their names
    and directions; since they aren't lm-eval's, there is no ``configs`` entry and no file of samples for them.

    Args:
        folder: made if it isn't there; files of other times stay.
        model: as the user named it; lm-eval makes a folder's name of it.
        scores: of the model.
        samples: what lm-eval logged for each document, by task; it is changed. None leaves that out.
        chat_template: in which questions were asked, if they were.

    Returns:
        The file of results.

    Raises:
        InputError: the folder can't be written to.
    """
    from lm_eval.loggers import EvaluationTracker

    results = _results(scores, model)
    with quiet():
        tracker = EvaluationTracker(output_path=str(folder))
        if scores.harness is not None:  # from which on its own command counts the seconds
            tracker.general_config_tracker.start_time -= time.time() - scores.harness["date"]
        tracker.general_config_tracker.log_experiment_args(
            model_source="hf",
            model_args={"pretrained": model},
            system_instruction=scores.settings.system_instruction,
            chat_template=chat_template,
            fewshot_as_multiturn=scores.settings.apply_chat_template and scores.settings.fewshot_as_multiturn,
        )
        tracker.save_results_aggregated(results, samples)
        for task, logged in (samples or {}).items():
            tracker.save_results_samples(task, logged)
    # lm-eval only logs what keeps it from writing.
    place, date = folder / str(tracker.general_config_tracker.model_name_sanitized), getattr(tracker, "date_id", None)
    written = [place / f"results_{date}.json", *(place / f"samples_{task}_{date}.jsonl" for task in samples or {})]
    if missing := [path for path in written if not path.is_file()]:
        raise InputError("--output", folder, f"{missing[0].name} can't be written there", fix="choose another folder")
    return written[0]


def _results(scores: Scores, model: str) -> dict[str, Any]:
    """lm-eval's results, or its empty schema, with our own figures added."""
    parts = ("results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")
    empty: dict[str, Any] = {part: {} for part in (*parts, "config")}
    results = copy.deepcopy(empty if scores.harness is None else scores.harness)
    results["config"] |= {"model": "hf", "model_args": {"pretrained": model}}
    harness = set(results["results"])
    for metric in scores.metrics:
        if metric.task not in harness:
            _add(results, metric)
    return results


def _add(results: dict[str, Any], metric: Metric) -> None:
    entry = results["results"].setdefault(metric.task, {"alias": metric.task})
    entry[f"{metric.metric},none"] = metric.value
    entry[f"{metric.metric}_stderr,none"] = "N/A" if metric.stderr is None else metric.stderr
    results["higher_is_better"].setdefault(metric.task, {})[metric.metric] = metric.higher_is_better
    results["n-samples"].setdefault(metric.task, {"original": metric.n, "effective": metric.n})
