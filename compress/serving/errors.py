"""Errors in the shape in which OpenAI's clients expect them."""

from typing import Any


class ApiError(Exception):
    """A request that is refused.

    Args:
        status: of the response.
        message: what is wrong, in a sentence.
        param: the field of the request that is at fault.
        code: a word for programs.
        kind: OpenAI's class of error.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind = kind
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON of the response."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Status 400."""
    return ApiError(400, message, param=param, code=code)


def server_fault() -> ApiError:
    """Status 500: a fault of ours, whose details are in the log and not sent out."""
    return ApiError(500, "the server failed on this request; its log says why", kind="server_error")
