"""lm-eval's model interface over a loaded model. Importing this module imports lm-eval, which takes seconds."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import Any, TextIO

import torch
from compress.calibrate.errors import InputError
from compress.calibrate.workers import Workers
from compress.evalsuite.continuations import score_continuations
from compress.evalsuite.head import CacheFactory
from compress.evalsuite.logits import Answer
from compress.evalsuite.prefix_tree import Continuation
from compress.evalsuite.settings import EvalSettings
from jinja2 import TemplateError
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import (
    Collator,
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import Cache

TokenRequest = tuple[Any, list[int], list[int]]
"""What lm-eval calls a request here: its texts or None, the context's tokens, the continuation's tokens."""


@dataclass(frozen=True)
class _Prompts:
    """Prompts that are generated from together.

    Attributes:
        ids: ``[batch, seq]``, padded on the left.
        mask: ``[batch, seq]``, zero on padding.
        until: texts that end an answer.
        options: of ``generate``.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    until: list[str]
    options: dict[str, Any]


class LoadedModel(HFLM):
    """``HFLM`` around a model and tokenizer in memory: the same figures in fewer and fuller forward passes.

    Texts become tokens as in ``HFLM``, and are cut to the model's context as there. What is computed once, in what
    batches and in which threads is ours. While the model runs it has the caller's output streams: lm-eval prints and
    draws bars in places that can't be switched off, so that the harness redirects both streams around the evaluation.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer; lm-eval may add a padding token to it.
        settings: batch size, longest sequence, and whether a bar is drawn.
        streams: stdout and stderr while the model runs.
        cache: makes the cache that each context, and each generated text, is held in; None for the model's own.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        settings: EvalSettings,
        streams: tuple[TextIO, TextIO],
        cache: CacheFactory | None = None,
    ) -> None:
        self._streams = streams
        self._silent = not settings.progress
        self._cache = cache
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=settings.batch_size,
            max_length=settings.max_length,
        )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in the model's chat template.

        Raises:
            InputError: the template refuses it.
        """
        try:
            text: str = super().apply_chat_template(chat_history, add_generation_prompt)
        except TemplateError as error:
            problem = f"the model's chat template refuses a question: {' '.join(str(error).split())}"
            raise InputError("eval.apply_chat_template", "true", problem) from error
        return text

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """Log-likelihood of each continuation in nats, and whether it is what greedy decoding gives.

        Raises:
            InputError: a continuation without tokens, or with more than the model's context.
        """
        found = self._encode_pairs([request.args for request in requests])
        for request, (_, _, continuation) in zip(requests, found, strict=True):
            size = len(continuation)
            if not size:
                raise InputError("eval.tasks", request.task_name, "one of its answers is empty")
            if size > self.max_length:
                problem = f"one of its answers has {size} tokens, more than the model's context of {self.max_length}"
                raise InputError("eval.tasks", request.task_name, problem)
        return self._loglikelihood_tokens(found, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text in nats, in windows of the model's context."""
        windows: list[TokenRequest] = []
        counts = []
        for request in requests:
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += own
            counts.append(len(own))
        answers = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        found = [sum(next(answers)[0] for _ in range(count)) for count in counts]
        for request, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generated text for each prompt, cut at its stop strings.

        Raises:
            InputError: a task wants more tokens than the model's context holds.
        """
        for request in requests:
            room = normalize_gen_kwargs(request.args[1], self.max_gen_toks)["max_gen_toks"]
            if room >= self.max_length:
                problem = f"it generates {room} tokens, and the model's context is {self.max_length}"
                raise InputError("eval.tasks", request.task_name, problem)
        sizes = {text: len(self.tok_encode(text)) for text in {request.args[0] for request in requests}}
        order = Collator(
            [request.args for request in requests],
            sort_fn=lambda args: (-sizes[args[0]], args[0]),
            group_by="gen_kwargs",
            group_fn=lambda args: args[1],
        )
        # A cache of the caller's might take padding for text.
        size = self.batch_size if self._cache is None else 1
        batches = [self._prompts(batch) for batch in order.get_batched(n=size)]
        self.tok_encode("")  # leaves the tokenizer without padding: the threads must not change it
        sampled = any(batch.options["do_sample"] for batch in batches)
        found: list[str] = []
        with (
            self._running("generate_until", len(requests), disable_tqdm) as done,
            # Samples are drawn from one generator, in order.
            Workers(1 if sampled or self.device.type != "cpu" else None) as workers,
        ):
            jobs = ((batch, None if self._cache is None else self._cache()) for batch in batches)
            for texts in workers.map(self._generate, jobs):
                found += texts
                done(len(texts))
        answers = order.get_original(found)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        items = []
        for _, context, continuation in requests:
            tokens = (context or [self.prefix_token_id]) + continuation
            items.append(Continuation(tuple(tokens[-(self.max_length + 1) :]), len(continuation)))
        size = override_bs or self.batch_size
        with self._running("loglikelihood", len(items), disable_tqdm) as done:
            answers = score_continuations(self.model, items, size, self._cache, done)
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[TokenRequest]:
        """As ``HFLM`` does it pair by pair, but each text once, and all in one call of the tokenizer."""
        # Spaces at the end of a context belong to the word that follows.
        texts = [(context.rstrip(), context[len(context.rstrip()) :] + rest) for context, rest in pairs]
        given = [text for text, (context, _) in zip(texts, pairs, strict=True) if context]
        whole = self._encode_all(context + rest for context, rest in given)
        alone = self._encode_all(context for context, _ in given)
        found: list[TokenRequest] = []
        for pair, (context, rest) in zip(pairs, texts, strict=True):
            if pair[0]:
                found.append((pair, alone[context], whole[context + rest][len(alone[context]) :]))
                continue
            tokens = self.tok_encode(rest, add_special_tokens=False)
            if tokens[:1] == [self.prefix_token_id]:
                found.append((pair, tokens[:1], tokens[1:]))
            else:
                found.append((pair, [self.prefix_token_id], tokens))
        return found

    def _encode_all(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Tokens of each text, as ``tok_encode`` gives them."""
        start = self.tokenizer.decode(self.prefix_token_id)
        groups: dict[bool, dict[str, None]] = {}
        for text in texts:
            groups.setdefault(has_bos_prefix(text, start), {})[text] = None
        found: dict[str, list[int]] = {}
        for begun, members in groups.items():
            options = {"add_special_tokens": False} if begun else {}
            found |= zip(members, self.tokenizer(list(members), **options)["input_ids"], strict=True)
        return found

    def _prompts(self, batch: Sequence[tuple[str, dict[str, Any]]]) -> _Prompts:
        """A batch that lm-eval's collator made: prompts with equal options."""
        texts, (wanted, *_) = zip(*batch, strict=True)
        options = dict(normalize_gen_kwargs(wanted, self.max_gen_toks))
        until = handle_stop_sequences(
            options.pop("until", None), eos=self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        )
        room = options.pop("max_gen_toks")
        ids, mask = self.tok_batch_encode(texts, left_truncate_len=self.max_length - room, truncation=self.truncation)
        options.setdefault("max_length", ids.shape[1] + room)
        return _Prompts(ids, mask, until, options)

    def _generate(self, job: tuple[_Prompts, Cache | None]) -> list[str]:
        prompts, cache = job
        options = dict(prompts.options)
        if cache is not None:
            options["past_key_values"] = cache
        ids = self._model_generate(
            context=prompts.ids.to(self.device),
            attention_mask=prompts.mask.to(self.device),
            stop=prompts.until,
            **options,
        )
        texts = [self.tok_decode(row) for row in ids[:, prompts.ids.shape[1] :].tolist()]
        return [postprocess_generated_text(text, stop=prompts.until, think_end_token=None) for text in texts]

    @contextmanager
    def _running(self, kind: str, total: int, silent: bool) -> Iterator[Callable[[int], None]]:
        """The caller's streams, and a bar on its stderr that is moved on by so many requests."""
        out, err = self._streams
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        bar = Progress(
            *columns,
            TimeRemainingColumn(),
            console=Console(file=err),
            disable=silent or self._silent,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        with redirect_stdout(out), redirect_stderr(err), bar:
            yield partial(bar.advance, bar.add_task(f"{kind} requests", total=total))
