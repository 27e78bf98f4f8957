"""From a valid request to what is to be generated: chat template, tokens, room in the context, the model's defaults."""

from collections.abc import Sequence

import jinja2
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from compress.generation import Sampling, Task
from compress.serving.errors import ApiError, bad_request
from compress.serving.schema import ChatRequest, CompletionRequest

_NO_TEMPLATE = "this model has no chat template; /v1/completions takes plain text"
COMPLETION_TOKENS = 16  # OpenAI's default for text completions


class Preparer:
    """Turns requests into tasks.

    Args:
        model: to be asked for its context and generation config.
        tokenizer: of the model.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        config = model.config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self._vocabulary: int = config.vocab_size
        self._defaults = model.generation_config
        self._tokenizer = tokenizer

    def chat(self, request: ChatRequest) -> list[Task]:
        """The task of a conversation.

        Raises:
            ApiError: status 400.
        """
        if not self._tokenizer.chat_template:
            raise bad_request(_NO_TEMPLATE, code="no_chat_template")
        turns = [
            {"role": "system" if message.role == "developer" else message.role, "content": message.content}
            for message in request.messages
        ]
        try:
            text = str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        except jinja2.TemplateError as error:
            raise bad_request(f"the model's chat template refuses these messages: {error}", "messages") from error
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        default = self._defaults.max_new_tokens
        wanted = request.max_completion_tokens or request.max_tokens
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        return [self._task(request, ids, "messages", wanted, default, logprobs)]

    def completion(self, request: CompletionRequest) -> list[Task]:
        """The tasks of one or several texts.

        Raises:
            ApiError: status 400.
        """
        tasks = []
        for prompt in request.prompt:
            ids = self._tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
            if any(token >= self._vocabulary for token in ids):
                raise bad_request(f"'prompt': token ids have to be below {self._vocabulary}", "prompt")
            tasks.append(self._task(request, ids, "prompt", request.max_tokens, COMPLETION_TOKENS, request.logprobs))
        return tasks

    def _task(
        self,
        request: ChatRequest | CompletionRequest,
        ids: Sequence[int],
        field: str,
        wanted: int | None,
        default: int | None,
        logprobs: int | None,
    ) -> Task:
        if not ids:
            raise bad_request(f"'{field}' has no tokens, so there is nothing to continue", field)
        length = self._room(len(ids), field, wanted, default)
        return Task(tuple(ids), length, request.n, self._sampling(request), tuple(request.stop), logprobs)

    def _room(self, prompt: int, field: str, wanted: int | None, default: int | None) -> int:
        """How many tokens may be generated."""
        if self.context is None:
            if wanted is None and default is None:
                raise bad_request("this model has no longest context, so a limit is needed", "max_tokens")
            return wanted or default or 1
        room = self.context - prompt
        longest = f"the longest context of this model is {self.context} tokens"
        if room < 1:
            raise _too_long(f"{longest}; '{field}' has {prompt}", field)
        if wanted is not None and wanted > room:
            problem = f"{longest}; '{field}' has {prompt}, so {wanted} more don't fit, at most {room} do"
            raise _too_long(problem, "max_tokens")
        return wanted or min(room, default or room)

    def _sampling(self, request: ChatRequest | CompletionRequest) -> Sampling:
        """The request's settings, where it has none those of the model's generation config, and else OpenAI's.

        A model whose generation config doesn't sample takes the likeliest token unless the request asks to sample.
        """
        defaults = self._defaults
        asked = any(value is not None for value in (request.top_p, request.top_k, request.min_p))
        temperature = 1.0 if defaults.temperature is None else defaults.temperature
        if not defaults.do_sample and not asked:
            temperature = 0.0
        return Sampling(
            temperature=_first(request.temperature, temperature),
            top_p=_first(request.top_p, defaults.top_p, 1.0),
            top_k=int(_first(request.top_k, defaults.top_k, 0)),
            min_p=_first(request.min_p, defaults.min_p, 0.0),
            repetition_penalty=_first(request.repetition_penalty, defaults.repetition_penalty, 1.0),
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=self._bias(request.logit_bias),
            seed=request.seed,
        )

    def _bias(self, bias: dict[str, float]) -> tuple[tuple[int, float], ...]:
        for token in bias:
            if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < self._vocabulary):
                raise bad_request(f"'logit_bias': its keys have to be token ids below {self._vocabulary}", "logit_bias")
        return tuple((int(token), value) for token, value in bias.items())


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _too_long(message: str, param: str) -> ApiError:
    return bad_request(message, param, "context_length_exceeded")
