"""What a server is told; nothing heavy is imported here."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Settings:
    """Limits and names of :func:`compress.serving.create_app`.

    Attributes:
        served_name: what requests call the model.
        api_key: what requests must bear; None lets everyone in.
        local_only: refuse requests that call the server by another name than this machine's own. A web page whose
            name was made to mean 127.0.0.1 could otherwise use a server that has no key.
        max_request_bytes: of a request's body.
        max_concurrent: requests that generate at the same time, each in a thread and with a cache of its own.
        max_queue: requests that may wait for their turn; further ones are sent away with status 503.
        body_seconds: how long a client may take to send its body.
    """

    served_name: str = "model"
    api_key: str | None = field(default=None, repr=False)
    local_only: bool = False
    max_request_bytes: int = 4 * 2**20
    max_concurrent: int = 2
    max_queue: int = 64
    body_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.max_concurrent < 1 or self.max_queue < 0 or self.max_request_bytes < 1 or self.body_seconds <= 0:
            raise ValueError("limits have to be positive")
        if not self.served_name or self.api_key == "":
            raise ValueError("an empty name or key can't be sent")
