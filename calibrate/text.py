"""Where text comes from: local files, Python's own documentation, or a dataset on the Hugging Face Hub."""

import hashlib
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from compress.calibrate.conversations import render
from compress.calibrate.errors import InputError
from compress.calibrate.files import SUFFIXES, cells, existing_file
from compress.calibrate.hub import MAX_ROWS, check_hub, hub_cells, parse_hub
from transformers import PreTrainedTokenizerBase

PYDOC = "pydoc"
MAX_CHARACTERS = 50_000_000  # text held in memory; a longer file is read up to here, and its origin says so
_FOREIGN = (".arrow", ".csv", ".docx", ".gz", ".html", ".json", ".md", ".pdf", ".text", ".tsv", ".xml", ".zip", ".zst")


@dataclass(frozen=True)
class TextSource:
    """Text to calibrate on or to score.

    Attributes:
        name: the source as the user writes it.
        documents: the text, one string a document.
        origin: where it is from and how much it is, in words for a report.
        digest: sha256 of the documents.
    """

    name: str
    documents: list[str]
    origin: str
    digest: str

    @property
    def characters(self) -> int:
        """The length of all documents."""
        return sum(map(len, self.documents))


def open_text(
    spec: str,
    column: str = "text",
    option: str = "calibration.source",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> TextSource:
    """Read a text source.

    Args:
        spec: a path to a ``.txt`` (one document), ``.jsonl`` or ``.parquet`` file; ``pydoc``, Python's own
            documentation; or ``NAME[:CONFIG[:SPLIT[:COLUMN]]]``, a dataset on the Hub.
        column: the column that holds text or conversations, where the spec names none.
        option: the option to name in errors.
        tokenizer: renders conversations with its chat template; without one the turns are joined by blank lines.

    Raises:
        InputError: a missing, empty, unreadable or truncated file, an unknown suffix, a missing column, text that
            isn't UTF-8, an unknown dataset, no connection.
    """
    spec = _given(spec, option)
    if spec == PYDOC:
        return _pydoc()
    if is_local(spec):
        path = existing_file(spec, option)
        documents, whole = _documents(cells(path, column, option, MAX_CHARACTERS), tokenizer, spec, option)
        return _source(spec, documents, str(path.resolve()), whole)
    hub = parse_hub(spec, column, option)
    documents, whole = _documents(hub_cells(hub, spec, option), tokenizer, spec, option)
    return _source(spec, documents, f"{hub}, of the Hugging Face Hub", whole and len(documents) < MAX_ROWS)


def check_text(spec: str, column: str = "text", option: str = "calibration.source") -> None:
    """The cheap part of :func:`open_text`: existence, suffix, the first row and its column; nothing is read in full.

    Raises:
        InputError: as :func:`open_text`, as far as the beginning of the source shows.
    """
    spec = _given(spec, option)
    if spec == PYDOC:
        return
    if is_local(spec):
        first = cells(existing_file(spec, option), column, option, limit=4096)
        _documents(islice(first, 1), None, spec, option, may_be_blank=True)
    else:
        check_hub(parse_hub(spec, column, option), spec, option)


def is_local(spec: str) -> bool:
    """Whether a spec means a file of this machine rather than a Hub dataset."""
    path = Path(spec).expanduser()
    return spec.startswith((".", "/", "~")) or path.suffix.lower() in SUFFIXES + _FOREIGN or path.exists()


def source_of(name: str, documents: list[str], origin: str) -> TextSource:
    """A source of text that is in memory already."""
    digest = hashlib.sha256()
    for document in documents:
        content = document.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little") + content)
    return TextSource(name, documents, origin, digest.hexdigest())


def _given(spec: str, option: str) -> str:
    if not spec.strip():
        raise InputError(option, repr(spec), "is empty", allowed="auto, self, pydoc, a file, or a Hub dataset")
    return spec.strip()


def _documents(
    rows: Iterable[object],
    tokenizer: PreTrainedTokenizerBase | None,
    spec: str,
    option: str,
    *,
    may_be_blank: bool = False,
) -> tuple[list[str], bool]:
    """The non-blank documents up to :data:`MAX_CHARACTERS`, and whether that was all of them."""
    documents: list[str] = []
    found, rest = 0, iter(rows)
    for text in _texts(rest, tokenizer, spec, option):
        documents.append(text[: MAX_CHARACTERS - found])
        found += len(text)
        if found >= MAX_CHARACTERS:
            return documents, False
    if not documents and not may_be_blank:
        raise InputError(option, spec, "there is no text in it")
    return documents, True


def _texts(rows: Iterator[object], tokenizer: PreTrainedTokenizerBase | None, spec: str, option: str) -> Iterator[str]:
    for number, cell in enumerate(rows, 1):
        text = render(cell, tokenizer)
        if text is None:
            kind = type(cell).__name__
            raise InputError(option, spec, f"row {number} holds a {kind}, neither text nor a list of role and content")
        if text.strip():
            yield text


def _source(spec: str, documents: list[str], place: str, whole: bool) -> TextSource:
    count = sum(map(len, documents))
    noun = "document" if len(documents) == 1 else "documents"
    extent = "" if whole else "the first "
    return source_of(spec, documents, f"{extent}{len(documents):,} {noun}, {count:,} characters of {place}")


def _pydoc() -> TextSource:
    from pydoc_data.topics import topics

    version = platform.python_version()
    documents = [topics[name] for name in sorted(topics)]
    return source_of(PYDOC, documents, f"Python's own documentation (pydoc topics of Python {version})")
