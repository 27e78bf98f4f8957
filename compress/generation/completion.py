"""One prompt answered by ``model.generate``, with everything that happens to the answer told as it happens."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from compress.generation.sampling import Sampling
from compress.generation.text import REPLACEMENT, TextStream

_NO_SAMPLING = {
    "do_sample": False,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "min_p": None,
    "max_length": None,
    "num_beams": 1,
    "num_return_sequences": 1,
}


@dataclass(frozen=True)
class Task:
    """What is to be generated.

    Attributes:
        prompt: token ids.
        max_new_tokens: where an answer ends at the latest; prompt and this fit in the model's context.
        answers: how many answers, generated as one batch.
        sampling: how tokens are chosen.
        stop: strings that end an answer.
        logprobs: tell every token's log-probability and those of so many of the likeliest tokens; None tells none.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    answers: int = 1
    sampling: Sampling = Sampling()  # noqa: RUF009 - frozen
    stop: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class ScoredToken:
    """A token in a place of the answer.

    Attributes:
        text: of the token alone.
        logprob: natural logarithm of its probability there, before temperature and filters.
        whole: its text is made of whole characters; else ``text`` is how the vocabulary writes it.
    """

    text: str
    logprob: float
    whole: bool


@dataclass(frozen=True)
class TokenScore:
    """A place of the answer.

    Attributes:
        chosen: the token that stands there.
        offset: characters of the answer before it.
        top: the likeliest tokens there, the likeliest first.
    """

    chosen: ScoredToken
    offset: int
    top: tuple[ScoredToken, ...]


@dataclass(frozen=True)
class Piece:
    """A further part of an answer.

    Attributes:
        index: of the answer.
        text: what comes next; may be empty.
        tokens: generated so far in this answer.
        finish: ``stop`` at the model's end token or a stop string, ``length`` at the limit; None if more follows.
        scores: of the tokens whose text was told since the last piece, if they were asked for.
    """

    index: int
    text: str
    tokens: int
    finish: str | None = None
    scores: tuple[TokenScore, ...] = ()


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    on_piece: Callable[[Piece], None],
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Generate all answers of a task.

    Several threads may do this with one model.

    Args:
        model: a decoder in eval mode.
        tokenizer: of the model.
        task: what to generate.
        on_piece: called for every piece, in this thread; each answer's last has ``finish``.
        cancelled: asked after every token; once it is true, nothing more is generated or told.
    """
    prompt = torch.tensor([task.prompt] * task.answers, device=model.device)
    config = _generation_config(model, task)
    recorder = None if task.logprobs is None else _Recorder()
    answers = [_Answer(index, tokenizer, task, end_tokens(model)) for index in range(task.answers)]
    processors = task.sampling.processors(task.answers, len(task.prompt))
    if recorder is not None:
        processors = LogitsProcessorList([recorder, *processors])
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=config,
        logits_processor=processors,
        stopping_criteria=StoppingCriteriaList([_Follow(answers, recorder, on_piece, cancelled)]),
    )


def end_tokens(model: PreTrainedModel) -> tuple[int, ...]:
    """Ids that end an answer of a model, as its generation config says; may be none."""
    ends = model.generation_config.eos_token_id
    return () if ends is None else tuple(ends) if isinstance(ends, (list, tuple)) else (int(ends),)


def _generation_config(model: PreTrainedModel, task: Task) -> GenerationConfig:
    """The model's own generation config, but for what the task decides."""
    config = copy.deepcopy(model.generation_config)
    # What is None here is taken from the model's config after all, so sampling is switched off by neutral values.
    for name, value in _NO_SAMPLING.items():
        setattr(config, name, value)
    config.max_new_tokens = task.max_new_tokens
    config.repetition_penalty = task.sampling.repetition_penalty
    config.return_dict_in_generate = False
    if config.pad_token_id is None:  # what is put behind an answer that ended while others of the batch go on
        config.pad_token_id = next(iter(end_tokens(model)), 0)
    return config


class _Recorder(LogitsProcessor):
    """Keeps the log-probabilities [rows, vocabulary] of the step in hand."""

    def __init__(self) -> None:
        self.logprobs = torch.empty(0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logprobs = scores.float().log_softmax(-1)
        return scores


class _Answer:
    """One row of the batch."""

    def __init__(self, index: int, tokenizer: PreTrainedTokenizerBase, task: Task, ends: tuple[int, ...]) -> None:
        self.done = False
        self._index, self._tokenizer, self._task, self._ends = index, tokenizer, task, ends
        self._text = TextStream(tokenizer, task.prompt, task.stop)
        self._tokens = 0
        self._scores: list[TokenScore] = []

    def push(self, token: int, logprobs: Tensor | None) -> Piece:
        """Take a token; ``logprobs`` [vocabulary] are those of its place."""
        self._tokens += 1
        finish: str | None = None
        text = ""
        if token in self._ends:
            finish = "stop"
        else:
            if logprobs is not None:
                self._scores.append(self._score(token, logprobs))
            text = self._text.push(token)
            if self._tokens == self._task.max_new_tokens:
                finish = "length"
        if finish and not self._text.stopped:
            text += self._text.finish()
        if self._text.stopped:
            finish = "stop"
        self.done = finish is not None
        return Piece(self._index, text, self._tokens, finish, self._told())

    def _score(self, token: int, logprobs: Tensor) -> TokenScore:
        values, ids = logprobs.topk(min(self._task.logprobs or 0, len(logprobs)))
        top = tuple(self._scored(other, value) for other, value in zip(ids.tolist(), values.tolist(), strict=True))
        return TokenScore(self._scored(token, float(logprobs[token])), self._text.decoded, top)

    def _scored(self, token: int, logprob: float) -> ScoredToken:
        text = str(self._tokenizer.decode([token]))
        if REPLACEMENT not in text:
            return ScoredToken(text, logprob, True)
        return ScoredToken(str(self._tokenizer.convert_ids_to_tokens(token)), logprob, False)

    def _told(self) -> tuple[TokenScore, ...]:
        """The scores of tokens whose text has been handed out; all that are left if no stop string cut any off."""
        whole = self.done and not self._text.stopped
        count = sum(whole or score.offset < self._text.released for score in self._scores)
        told, self._scores = tuple(self._scores[:count]), self._scores[count:]
        return told


class _Follow(StoppingCriteria):
    """Sees every token right after it was chosen, and says which rows have ended."""

    def __init__(
        self,
        answers: list[_Answer],
        recorder: _Recorder | None,
        on_piece: Callable[[Piece], None],
        cancelled: Callable[[], bool],
    ) -> None:
        self._answers, self._recorder = answers, recorder
        self._on_piece, self._cancelled = on_piece, cancelled

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        if self._cancelled():
            return torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for row, (answer, token) in enumerate(zip(self._answers, input_ids[:, -1].tolist(), strict=True)):
            if answer.done:
                continue
            piece = answer.push(token, None if self._recorder is None else self._recorder.logprobs[row])
            if piece.text or piece.finish or piece.scores:
                self._on_piece(piece)
        return torch.tensor([answer.done for answer in self._answers], device=input_ids.device)
