"""Requests as the API takes them. What it can't honour is refused by name, never ignored."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from compress.serving.errors import bad_request

MAX_ANSWERS = 16
MAX_PROMPTS = 32
MAX_STOPS = 16

# Fields that describe a request and ask for nothing.
_DESCRIPTIVE = ("user", "metadata", "safety_identifier", "prompt_cache_key")
# Values of further fields that ask for what happens anyway.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "echo": (False,),
    "suffix": ("",),
}


def _text(content: Any) -> Any:
    """The text of a message that is given in parts."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError("only parts of type 'text' are understood")
    return "\n".join(part["text"] for part in content)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompts(value: Any) -> Any:
    """One prompt or several, each text or token ids, as a list of prompts."""
    single = isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], int))
    return [value] if single else value


def _without_nulls(data: Any) -> Any:
    """null is the same as a field that isn't there, at every level where clients send it."""
    return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        return _without_nulls(data)


class Message(_Part):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text)]


class StreamOptions(_Part):
    """How an answer is streamed."""

    include_usage: bool = False


class _Request(_Part):
    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1024)]],
        BeforeValidator(_as_list),
        Field(max_length=MAX_STOPS),
    ] = []
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] = {}
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None

    def require_honourable(self) -> None:
        """See that everything that is asked for can be done.

        Raises:
            ApiError: status 400, naming the field.
        """
        if self.stream_options is not None:
            if not self.stream:
                raise bad_request("'stream_options' is only allowed with 'stream': true", "stream_options")
            _refuse_extra(self.stream_options, "stream_options.", {"include_obfuscation": lambda value: value is False})
        _refuse_extra(self, "", {"best_of": lambda value: value == self.n})


class ChatRequest(_Request):
    """Body of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def require_honourable(self) -> None:
        """As of every request, and of its messages.

        Raises:
            ApiError: status 400, naming the field.
        """
        super().require_honourable()
        for index, message in enumerate(self.messages):
            empty = {"tool_calls": lambda value: value == [], "annotations": lambda value: value == []}
            _refuse_extra(message, f"messages.{index}.", empty)
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise bad_request("'max_tokens' and 'max_completion_tokens' contradict each other", "max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("'top_logprobs' is only allowed with 'logprobs': true", "top_logprobs")


class CompletionRequest(_Request):
    """Body of ``/v1/completions``."""

    prompt: Annotated[
        list[str | list[Annotated[int, Field(ge=0)]]],
        BeforeValidator(_prompts),
        Field(min_length=1, max_length=MAX_PROMPTS),
    ]
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


def _refuse_extra(part: _Part, path: str, allowed: dict[str, Callable[[Any], bool]]) -> None:
    for name, value in (part.model_extra or {}).items():
        if not path and (name in _DESCRIPTIVE or value in _NEUTRAL.get(name, ())):
            continue
        if name in allowed and allowed[name](value):
            continue
        known = name in _NEUTRAL or name in allowed
        problem = "this value is not supported by this server" if known else "this server has no such parameter"
        raise bad_request(f"'{path}{name}': {problem}", f"{path}{name}", "unsupported_parameter")
