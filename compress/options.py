"""What a command is told beside its recipe: where to run, what to override, what to compare with.

Plain frozen dataclasses with the defaults of the command line, so that a Python caller writes
``compress.run(model, "rsq", options=RunOptions(set=("weights.bits=4",)))`` and gets what the command does.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PERPLEXITY_WINDOW = 1024
PERPLEXITY_WINDOWS = 24
LENGTHS = (2048, 4096)
DEPTHS = 5
EVAL_BATCH_SIZE = 8
KV_CHUNK = 64
LARGEST_SEED = 2**32 - 1  # what numpy, and so lm-eval, accepts


@dataclass(frozen=True)
class RunOptions:
    """Options of ``compress run`` and ``compress plan``.

    Attributes:
        set: recipe overrides, ``section.key=value``, applied in this order.
        calibration: replaces ``calibration.source``.
        eval_tasks: replaces ``eval.tasks``; an empty tuple switches scoring off; None keeps the recipe's.
        task_path: replaces ``eval.task_path``, a folder of lm-eval task files.
        resume: continue an interrupted run in the same folder; False starts over.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        seed: replaces ``calibration.seed``, from which every random choice of a run derives, and, where the recipe
            scores, ``eval.seed`` unless ``set`` gives that.
        trust_remote_code: let a model's own Python code run.
        dry_run: stop after the plan.
        push: ``ORG/NAME`` on the Hub, where the finished artifact goes; account and name are checked first of all.
        public: let everyone see what is pushed.
    """

    set: tuple[str, ...] = ()
    calibration: str | None = None
    eval_tasks: tuple[str, ...] | None = None
    task_path: Path | None = None
    resume: bool = True
    device: str = "auto"
    seed: int | None = None
    trust_remote_code: bool = False
    dry_run: bool = False
    push: str | None = None
    public: bool = False

    def overrides(self) -> tuple[str, ...]:
        """Everything here that changes the recipe, as ``section.key=value``; what has its own option comes last."""
        own: list[str] = []
        if self.calibration is not None:
            own.append(f"calibration.source={json.dumps(self.calibration, ensure_ascii=False)}")
        if self.seed is not None:
            own.append(f"calibration.seed={self.seed}")
        if self.eval_tasks is not None and not self.eval_tasks:
            own.append("eval=null")
        elif self.eval_tasks is not None:
            own.append(f"eval.tasks={json.dumps(self.eval_tasks, ensure_ascii=False)}")
        if self.task_path is not None and self.eval_tasks != ():
            own.append(f"eval.task_path={json.dumps(str(self.task_path), ensure_ascii=False)}")
        if self.seed is not None and not any(entry.partition("=")[0].strip() == "eval.seed" for entry in self.set):
            own.append(f"eval?.seed={self.seed}")  # without a section "eval", nothing is to be scored
        return (*self.set, *own)


@dataclass(frozen=True)
class EvalOptions:
    """Options of ``compress eval``.

    Attributes:
        baseline: a second model, scored on the same items and laid beside the first.
        task_path: folder of lm-eval task files; data files are relative to the task file.
        limit: items a task; None takes all.
        num_fewshot: examples in a prompt; None is the task's own number.
        apply_chat_template: ask lm-eval's questions in the chat template.
        window: tokens a window of perplexity and divergence.
        windows: how many windows; None takes the whole text.
        stride: tokens between the beginnings of two windows; None is no overlap.
        text: source of the text of perplexity and divergence, with the syntax of the recipe's ``eval.text``.
        lengths: tokens of a long-context prompt.
        depths: places of the needle in it, evenly spread.
        samples: long-context questions for each length and depth.
        haystack: text around the needle, with the syntax of the recipe's ``eval.haystack``.
        seed: of the long-context questions.
        kv_prompt: tokens of a window that fill a compressed KV cache at once and aren't scored, where perplexity and
            divergence measure it; None is half of the window.
        kv_chunk: tokens that follow at once behind this prompt.
        batch_size: sequences a forward pass.
        packed: score an artifact as it is run, over packed weights, instead of unpacked.
        activations: as in :class:`GenerateOptions`; ``int8`` scores it packed.
        threads: as in :class:`GenerateOptions`, of an artifact that is scored packed.
        device: as in :class:`RunOptions`.
        trust_remote_code: let a model's own Python code run.
    """

    baseline: str | None = None
    task_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    window: int = PERPLEXITY_WINDOW
    windows: int | None = PERPLEXITY_WINDOWS
    stride: int | None = None
    text: str = "auto"
    lengths: tuple[int, ...] = LENGTHS
    depths: int = DEPTHS
    samples: int = 1
    haystack: str = "auto"
    seed: int = 0
    kv_prompt: int | None = None
    kv_chunk: int = KV_CHUNK
    batch_size: int = EVAL_BATCH_SIZE
    packed: bool = False
    activations: Literal["float", "int8"] = "float"
    threads: int = 1
    device: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class GenerateOptions:
    """Options of ``compress generate``.

    Attributes:
        max_new_tokens: where generation stops at the latest.
        temperature: 0 takes the likeliest token every time, above that tokens are sampled.
        seed: of the sampling.
        chat: wrap the prompt in the model's chat template; None does so if the model has one.
        activations: what packed layers multiply on a CPU: ``float``, or activations rounded to 8 bits (``int8``).
        threads: of packed layers on a CPU for up to 8 tokens at once.
        kv: let an artifact's attention plan decide on the KV cache; False keeps it at 16 bits or more.
        device: as in :class:`RunOptions`.
        trust_remote_code: let a model's own Python code run.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    chat: bool | None = None
    activations: Literal["float", "int8"] = "float"
    threads: int = 1
    kv: bool = True
    device: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class ServeOptions:
    """Options of ``compress serve``.

    Attributes:
        host: address to listen at; only this machine reaches the default.
        port: of the server; 0 takes any that is free.
        api_key_file: file with the key that requests must bear; None lets everyone in.
        served_name: what requests call the model; None is the name of its folder or file.
        max_request_bytes: of a request's body.
        max_concurrent: requests that generate at the same time.
        max_queue: requests that may wait; further ones are sent away.
        grace_seconds: how long requests may go on after the server was told to stop.
        activations: as in :class:`GenerateOptions`.
        threads: as in :class:`GenerateOptions`, for each request that runs.
        kv: as in :class:`GenerateOptions`.
        device: as in :class:`RunOptions`.
        trust_remote_code: let a model's own Python code run.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    served_name: str | None = None
    max_request_bytes: int = 4 * 2**20
    max_concurrent: int = 2
    max_queue: int = 64
    grace_seconds: int = 30
    activations: Literal["float", "int8"] = "float"
    threads: int = 1
    kv: bool = True
    device: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class BenchOptions:
    """Options of ``compress bench``.

    Attributes:
        prompt_tokens: of the timed prompt; None is 512, or what the context leaves.
        new_tokens: generated after it, from 2.
        rounds: each times model, baseline, baseline, model.
        lengths: tokens in the cache whose bytes are counted; None is 512 and 2048, as far as the context allows.
        device: as in :class:`RunOptions`.
        dtype: of the computation: ``float32``, ``bfloat16``, ``float16``; ``auto`` is float32 on a CPU, else bfloat16.
        one_at_a_time: keep one model in memory and load it again for each turn; without it that is done where memory
            is short.
        seed: of the prompt.
        trust_remote_code: let a model's own Python code run.
        activations: as in :class:`GenerateOptions`.
        threads: as in :class:`GenerateOptions`.
    """

    prompt_tokens: int | None = None
    new_tokens: int = 32
    rounds: int = 5
    lengths: tuple[int, ...] | None = None
    device: str = "auto"
    dtype: str = "auto"
    one_at_a_time: bool = False
    seed: int = 0
    trust_remote_code: bool = False
    activations: Literal["float", "int8"] = "float"
    threads: int = 1
