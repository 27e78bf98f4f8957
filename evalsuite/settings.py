"""How a model is scored: everything that must be equal for two scores to be comparable."""

from dataclasses import dataclass, replace

from compress.evalsuite.sliding import KV_CHUNK, Feed


@dataclass(frozen=True)
class EvalSettings:
    """Settings of one evaluation; the same names as in the recipe's section ``eval``.

    Attributes:
        window: tokens per window of perplexity and divergence.
        windows: number of windows from the start of the text; None for all.
        stride: tokens between the beginnings of two windows; None for windows without overlap.
        limit: number of questions per lm-eval task; None for all.
        task_path: folder of lm-eval task files, in addition to the built-in ones.
        batch_size: questions or prompts per forward pass in lm-eval tasks; it changes speed, not results.
        num_fewshot: examples before each question; None for each task's own number.
        max_length: longest sequence in tokens for lm-eval tasks; None for the model's context.
        bootstrap_iters: resamples for standard errors without a closed form; 0 leaves out all standard errors.
        progress: show lm-eval's progress bars on stderr.
        apply_chat_template: show lm-eval's questions as a user's turn in the tokenizer's chat template.
        system_instruction: what the system says before each question; without a chat template, text before it.
        fewshot_as_multiturn: in a chat template, each example is a turn of its own.
        lengths: tokens of the long-context tasks' prompts.
        depths: places of the needle, evenly spread from the beginning to the end of the haystack.
        samples: long-context questions for each length and depth.
        seed: of the long-context tasks.
        kv_prompt: tokens of a window that fill the cache and aren't scored, where perplexity and divergence measure a
            cache; None gives windows at once, through no cache.
        kv_chunk: tokens at once behind this prompt.
    """

    window: int = 1024
    windows: int | None = 24
    stride: int | None = None
    limit: int | None = None
    task_path: str | None = None
    batch_size: int = 8
    num_fewshot: int | None = None
    max_length: int | None = None
    bootstrap_iters: int = 200
    progress: bool = False
    apply_chat_template: bool = False
    system_instruction: str | None = None
    fewshot_as_multiturn: bool = True
    lengths: tuple[int, ...] = (2048, 4096)
    depths: int = 5
    samples: int = 1
    seed: int = 0
    kv_prompt: int | None = None
    kv_chunk: int = KV_CHUNK

    @property
    def feed(self) -> Feed | None:
        """How windows go through a cache; None where they don't."""
        return None if self.kv_prompt is None else Feed(self.kv_prompt, self.kv_chunk)

    def through_cache(self) -> "EvalSettings":
        """The same, with windows that go through a cache: half of a window is the prompt if nothing else is said."""
        return self if self.kv_prompt is not None else replace(self, kv_prompt=Feed.half(self.window).prompt)
