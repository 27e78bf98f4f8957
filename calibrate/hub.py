"""Text from the Hugging Face Hub: ``NAME[:CONFIG[:SPLIT[:COLUMN]]]``, a bounded number of rows, streamed."""

import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.calibrate.errors import InputError
from compress.calibrate.files import missing_column
from huggingface_hub import HfApi, constants, get_session
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError  # type: ignore[attr-defined]

MAX_ROWS = 40_000  # rows read of a Hub dataset: WikiText-2 whole
_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_URL = re.compile(r"https?://[\w.-]+(:\d+)?(/\S*)?", re.ASCII)
_LOCAL = "give a local .txt, .jsonl or .parquet file, or 'self' for text that the model writes itself"


@dataclass(frozen=True)
class HubText:
    """A text column of a Hub dataset."""

    name: str
    config: str | None
    split: str
    column: str

    def __str__(self) -> str:
        config = f", config {self.config}" if self.config else ""
        return f"{self.name}{config}, split {self.split}, column {self.column}"


def parse_hub(spec: str, column: str, option: str) -> HubText:
    """Read ``NAME[:CONFIG[:SPLIT[:COLUMN]]]``; an empty part means its default (no config, ``train``, ``column``).

    Raises:
        InputError: not of this form.
    """
    name, *rest = spec.split(":")
    if not _NAME.fullmatch(name) or len(rest) > 3:
        raise InputError(
            option,
            spec,
            "is neither a text file nor the name of a Hub dataset",
            allowed="NAME[:CONFIG[:SPLIT[:COLUMN]]]",
        )
    config, split, field = [*rest, "", "", ""][:3]
    return HubText(name, config or None, split or "train", field or column)


def hub_reachable(timeout: float = 3.0) -> bool:
    """Whether the Hub answers within ``timeout`` seconds. Never raises."""
    return hub_problem(timeout) is None


def hub_problem(timeout: float = 3.0) -> str | None:
    """Why the Hub can't be used, as a clause, or None when it answers. One request; never raises.

    Honours ``HF_HUB_OFFLINE`` and ``HF_ENDPOINT`` as huggingface_hub read them when it was imported.
    """
    if constants.HF_HUB_OFFLINE:
        return "the Hub is switched off (HF_HUB_OFFLINE)"
    url = constants.ENDPOINT
    if not _URL.fullmatch(url):
        return f"HF_ENDPOINT={url} isn't a web address"
    outcome: list[str | None] = []

    def ask() -> None:
        try:
            status = get_session().head(url, timeout=timeout).status_code
            outcome.append(None if status < 500 else f"{url} answered with status {status}")
        except (HTTPError, OSError, ValueError, RuntimeError) as error:
            outcome.append(f"{url} can't be reached ({_first_line(error)})")

    # A look-up of the host name obeys no timeout of the HTTP client, so the whole request is waited for here.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return outcome[0] if outcome else f"{url} gave no answer within {timeout:g} s"


def check_hub(text: HubText, spec: str, option: str) -> None:
    """Find out cheaply that a dataset can't be read: no Hub and no local copy, or no such dataset.

    Raises:
        InputError: with the reason.
    """
    problem = hub_problem()
    if problem is not None:
        _need_local_copy(text, spec, option, problem)
        return
    try:
        HfApi().dataset_info(text.name, timeout=10)
    except RepositoryNotFoundError as error:
        raise _unknown(spec, option) from error
    except (HTTPError, OSError):
        return  # busy or gated: reading it will tell


def hub_cells(text: HubText, spec: str, option: str) -> Iterator[object]:
    """What the column holds in the first :data:`MAX_ROWS` rows.

    Streams from the Hub where it can be reached, else reads the copy that ``datasets`` keeps.

    Raises:
        InputError: the Hub is out of reach and there is no copy; unknown dataset, config, split or column.
    """
    problem = hub_problem()
    if problem is not None:
        _need_local_copy(text, spec, option, problem)
    for row in _rows(text, spec, option, streaming=problem is None):
        if text.column not in row:
            raise missing_column(option, spec, text.column, list(row))
        yield row[text.column]


def _rows(text: HubText, spec: str, option: str, *, streaming: bool) -> Iterator[dict[str, Any]]:
    import datasets  # takes a second, and most runs don't need it

    try:
        rows = datasets.load_dataset(text.name, text.config, split=text.split, streaming=streaming)
        for count, row in enumerate(rows):
            if count == MAX_ROWS:
                return
            yield row
    except datasets.exceptions.DatasetNotFoundError as error:
        raise _unknown(spec, option) from error
    except (datasets.exceptions.DatasetsError, HTTPError, OSError, ValueError, RuntimeError) as error:
        raise InputError(option, spec, f"can't be read from the Hub ({_first_line(error)})", fix=_LOCAL) from error


def _need_local_copy(text: HubText, spec: str, option: str, problem: str) -> None:
    from datasets import config

    if not Path(config.HF_DATASETS_CACHE, text.name.replace("/", "___")).is_dir():
        raise InputError(option, spec, f"{problem}, and this machine holds no copy of the dataset", fix=_LOCAL)


def _unknown(spec: str, option: str) -> InputError:
    return InputError(
        option, spec, "no such dataset on the Hub, or it is private or gated", fix="check the name, or `hf auth login`"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
