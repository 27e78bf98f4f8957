"""``compress push``: an artifact on the Hugging Face Hub, in one commit.

One commit means that nobody ever downloads half an artifact. What was sent before an interruption is kept by the Hub's
storage of large files, and files that it holds already are left out, so the same command goes on where it stopped.
"""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

from compress.artifact.account import Destination, check_id, refusal
from compress.artifact.outgoing import Outgoing, check_finished, outgoing
from compress.artifact.privacy import shareable
from compress.artifact.target import Target, open_target
from compress.evalsuite.report.wording import nbytes, plural


@dataclass(frozen=True)
class PushPlan:
    """A push before it happens.

    Attributes:
        folder: the artifact.
        target: where it goes.
        files: all files that the repository will hold of it.
        removed: files there that the artifact doesn't have.
        left_out: what stands in the folder and isn't part of the artifact.
        title: what the commit is called.
    """

    folder: Path
    target: Target
    files: list[Outgoing]
    removed: list[str]
    left_out: list[str]
    title: str

    @property
    def sent(self) -> list[Outgoing]:
        """The files that aren't there already."""
        return [file for file in self.files if self._state(file) != "there"]

    @property
    def needed(self) -> bool:
        """Whether anything has to be done at all."""
        published = self.target.destination.public and self.target.private
        return bool(self.sent or self.removed or published)

    def _state(self, file: Outgoing) -> str:
        remote = self.target.files.get(file.name)
        return "new" if remote is None else "there" if file.same_as(remote) else "changed"

    def lines(self) -> list[str]:
        """For a terminal: where to, every file, and how much is to be sent."""
        lines = [f"{self.folder} -> {self.target}"]
        lines += [f"  {self._state(file):<8} {nbytes(file.size):>10}  {file.name}" for file in self.files]
        lines += [f"  removed              {name}" for name in self.removed]
        total, send = sum(file.size for file in self.files), sum(file.size for file in self.sent)
        lines.append(f"{plural(len(self.files), 'file')}, {nbytes(total)}; {nbytes(send)} to send")
        if self.left_out:
            more = "" if len(self.left_out) <= 5 else f" and {len(self.left_out) - 5} more"
            lines.append(f"not part of the artifact, left out: {', '.join(self.left_out[:5])}{more}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {
            "repo": self.target.destination.repo,
            "url": self.target.url,
            "public": self.target.destination.public,
            "files": [{"name": file.name, "bytes": file.size, "state": self._state(file)} for file in self.files],
            "removed": self.removed,
            "left_out": self.left_out,
        }


@dataclass(frozen=True)
class Pushed:
    """What a push left on the Hub.

    Attributes:
        url: of the repository.
        commit: what the artifact is there as, 40 hexadecimal digits.
        sent: names of the files that were sent.
        bytes_sent: their size.
    """

    url: str
    commit: str
    sent: list[str]
    bytes_sent: int

    def lines(self) -> list[str]:
        """For a terminal."""
        sent = f"{plural(len(self.sent), 'file')}, {nbytes(self.bytes_sent)} sent"
        return [f"{self.url} is complete: {sent if self.sent else 'everything was there already'}"]

    def to_json(self) -> dict[str, Any]:
        """As JSON types."""
        return {"url": self.url, "commit": self.commit, "sent": self.sent, "bytes_sent": self.bytes_sent}


def push(folder: Path | str, repo: str, *, public: bool = False, overwrite: bool = False) -> Pushed:
    """Put an artifact on the Hugging Face Hub: ``compress push`` in Python, without a question.

    Only the artifact's own files are sent, those that the Hub has already are not. Local paths are left out of report,
    recipe and card. The account is that of ``hf auth login`` or ``HF_TOKEN``.

    Args:
        folder: a finished artifact.
        repo: ``ORG/NAME``; made if it doesn't exist.
        public: let everyone see it; a new repository is private otherwise, and one that is public is refused.
        overwrite: replace whatever the repository holds; without it, another model there is refused.

    Returns:
        The repository's address, the commit and what was sent.

    Raises:
        InputError: an unfinished or damaged artifact, an impossible name, no login, no right to write, a repository
            with other content, the storage limit, or a lost connection. The same call goes on from there.
    """
    return send(plan_push(Path(folder), Destination(repo, public, overwrite)))


def plan_push(folder: Path, destination: Destination) -> PushPlan:
    """What a push would send; nothing is written, here or there.

    Raises:
        InputError: as :func:`push`, as far as it can be known before.
    """
    check_id(destination)
    report = check_finished(folder)
    target = open_target(destination)
    target.check_content(shareable(report)["fingerprint"])
    files, left_out = outgoing(folder, destination.repo)
    own = {file.name for file in files}
    former = {} if target.report is None else target.report["artifact"].get("files", {})
    stale = target.files if destination.overwrite else former
    removed = sorted(name for name in stale if name in target.files and name not in own and not name.startswith("."))
    name = report["recipe"]["name"]
    return PushPlan(folder, target, files, removed, left_out, f"{name}, made by compress {version('compress')}")


def send(plan: PushPlan) -> Pushed:
    """Do what a plan says.

    Raises:
        InputError: as :func:`push`.
    """
    api, target, destination = HfApi(), plan.target, plan.target.destination
    adds = [CommitOperationAdd(file.name, file.content) for file in plan.sent]
    removals = [CommitOperationDelete(name) for name in plan.removed]
    commit = target.head
    try:
        if target.head is None:
            api.create_repo(destination.repo, private=not destination.public, exist_ok=True)
        if adds or removals:
            commit = api.create_commit(
                destination.repo, [*adds, *removals], commit_message=plan.title, parent_commit=target.head
            ).oid
        if destination.public and target.private:
            api.update_repo_settings(destination.repo, private=False)
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        raise refusal(error, destination) from error
    return Pushed(target.url, str(commit), [file.name for file in plan.sent], sum(file.size for file in plan.sent))
