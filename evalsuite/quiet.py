"""Context managers that hold still what lm-eval and datasets do to the whole process."""

import io
import logging
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache
from typing import Any

import numpy as np
import torch

_NOISY = ("lm_eval", "transformers.tokenization_utils_base")


@contextmanager
def quiet() -> Iterator[None]:
    """No log lines below ERROR from lm-eval, no bars from datasets, nothing printed; all is restored at the end."""
    import datasets

    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def seeded() -> Iterator[None]:
    """lm-eval's own default seeds for all random generators; the caller's states are restored at the end."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextmanager
def single_process() -> Iterator[None]:
    """No process pool in lm-eval's bootstrap: forking a process that holds a model costs more than it saves."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


@contextmanager
def templates_kept() -> Iterator[None]:
    """lm-eval compiles a task's templates once, not anew for each document and field, which takes most of its time."""
    from lm_eval import utils

    environment: Any = utils.env
    environment.from_string = cache(environment.from_string)
    try:
        yield
    finally:
        del environment.from_string


@contextmanager
def weights_untouched(model: Any) -> Iterator[None]:
    """Within it ``model.tie_weights()`` does nothing, and the model is in evaluation mode.

    lm-eval ties the weights of a model that it is given. On a model whose config still says "tied" while its head was
    untied or quantized, that would overwrite the head.
    """
    was_training = model.training
    model.eval()
    model.tie_weights = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del model.tie_weights
        model.train(was_training)
