"""How a model is scored: everything that must be equal for two scores to be comparable."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvalSettings:
    """Settings of one evaluation; the same names as in the recipe's section ``eval``.

    Attributes:
        window: tokens per perplexity window.
        windows: number of perplexity windows from the start of the text; None for all.
        limit: number of questions per lm-eval task; None for all.
        task_path: folder of lm-eval task files, in addition to the built-in ones.
        batch_size: sequences per forward pass in lm-eval tasks; it changes speed, not results.
        num_fewshot: examples before each question; None for each task's own number.
        max_length: longest sequence in tokens for lm-eval tasks; None for the model's context.
        bootstrap_iters: resamples for standard errors without a closed form; 0 leaves out all standard errors.
        progress: show lm-eval's progress bars on stderr.
    """

    window: int = 1024
    windows: int | None = 24
    limit: int | None = None
    task_path: str | None = None
    batch_size: int = 8
    num_fewshot: int | None = None
    max_length: int | None = None
    bootstrap_iters: int = 200
    progress: bool = False
