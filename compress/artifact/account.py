"""Who pushes, and to where: is the name possible, may this account write there, and what does a refusal mean.

The account comes from the token that huggingface_hub finds (``hf auth login``, or ``HF_TOKEN``); the token itself never
leaves that library, and is in no message of ours.
"""

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is that of its httpx
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from compress.calibrate.errors import InputError, did_you_mean

_LOGIN = "run `hf auth login`, or set HF_TOKEN, with a token from https://huggingface.co/settings/tokens that may write"
_LATER = "check the connection and give the same command again: what is on the Hub already isn't sent twice"
_BUSY = (409, 412)


@dataclass(frozen=True)
class Destination:
    """Where the user wants an artifact to go.

    Attributes:
        repo: ``ORG/NAME``.
        public: whether everyone may see it; a new repository is private otherwise.
        overwrite: replace whatever the repository holds.
        option: how the user named it, for errors.
    """

    repo: str
    public: bool = False
    overwrite: bool = False
    option: str = "ORG/NAME"

    def error(self, problem: str, fix: str | None = None) -> InputError:
        """An error about this destination."""
        return InputError(self.option, self.repo, problem, fix=fix)


def check_id(destination: Destination) -> None:
    """Check the form of a repository's name.

    Raises:
        InputError: with the nearest possible name.
    """
    repo = destination.repo
    try:
        validate_repo_id(repo)
    except HFValidationError:
        fix = f"did you mean {near!r}?" if (near := nearest_id(repo)) else None
        allowed = "ORG/NAME of letters, digits, '-', '_' and '.', at most 96 characters"
        raise InputError(destination.option, repo, "can't be a name on the Hub", allowed=allowed, fix=fix) from None
    if repo.count("/") != 1:
        raise destination.error("names no account", f"give it as ORG/NAME, for instance your-name/{repo}")


def nearest_id(repo: str) -> str | None:
    """The possible name that is nearest to ``repo``, or None if nothing is left of it."""
    repo = re.sub(r"^https?://[^/]+/|^models/", "", repo.strip())
    parts = [re.sub(r"[^\w.-]+", "-", part, flags=re.ASCII) for part in repo.split("/") if part]
    parts = [re.sub(r"-{2,}", "-", re.sub(r"\.{2,}", ".", part)).strip("-.").removesuffix(".git") for part in parts]
    near = "/".join(part for part in parts[:2] if part)[:96].rstrip("-.")
    return near or None


def open_account(api: HfApi, destination: Destination) -> dict[str, Any]:
    """Who the token belongs to, as the Hub describes it.

    Raises:
        InputError: nobody is logged in, or the token is invalid or may not write.
    """
    if get_token() is None:
        raise destination.error("you are not logged in to the Hub", _LOGIN)
    try:
        account: dict[str, Any] = api.whoami()
    except (HTTPError, OSError) as error:
        raise refusal(error, destination) from error
    token = account.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        raise destination.error("your token can only read", _LOGIN)
    scopes = token.get("fineGrained", {}).get("scoped")
    if token.get("role") == "fineGrained" and scopes is not None:
        names = (destination.repo, destination.repo.partition("/")[0])
        rights = [
            right
            for scope in scopes
            if scope.get("entity", {}).get("name") in names
            for right in scope.get("permissions", [])
        ]
        if not any(fnmatch(right, "repo.*write") for right in rights):
            raise destination.error(f"your token has no right to write to {names[1]}", _LOGIN)
    return account


def check_namespace(account: dict[str, Any], destination: Destination) -> None:
    """Refuse a new repository where the account can't make one.

    Raises:
        InputError: with the nearest account that it can write to.
    """
    namespace = destination.repo.partition("/")[0]
    orgs = {org.get("name"): org.get("roleInOrg") for org in account.get("orgs", [])}
    names = [name for name in (account.get("name"), *orgs) if name]
    if namespace.lower() not in [name.lower() for name in names]:
        fix = did_you_mean(namespace, names) or f"your account can write to: {', '.join(names)}"
        raise destination.error(f"{namespace} is neither your account nor an organization of yours", fix)
    if orgs.get(namespace) in ("read", "no_access"):
        raise destination.error(f"your account can only read in {namespace}", "ask for the role `write` there")


def refusal(error: BaseException, destination: Destination) -> InputError:
    """What went wrong with the Hub, in one line without addresses or tokens."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):
        cause = cause.__cause__
    if cause is None:
        if isinstance(error, ValueError):
            return destination.error(f"the Hub refused ({_line(str(error))})")
        return destination.error(f"the connection to the Hub was lost ({type(error).__name__})", _LATER)
    status, told = cause.response.status_code, _line(cause.server_message or "")
    if status == 402 or (status in (403, 413) and re.search("storage|quota|limit|too large", told, re.IGNORECASE)):
        return destination.error(f"the Hub's storage limit is reached ({told})", "free some space there")
    if status == 401:
        return destination.error("the Hub doesn't accept your token", _LOGIN)
    if status == 403:
        fix = "choose your own account, or a token that may write there"
        return destination.error("your account or token may not write there" + (f" ({told})" if told else ""), fix)
    if status in _BUSY:
        return destination.error("the repository was changed meanwhile", "give the same command again")
    if status == 429:
        return destination.error("the Hub asks to slow down", "wait some minutes and give the same command again")
    if status >= 500:
        return destination.error(f"the Hub has a problem (status {status})", _LATER)
    return destination.error(f"the Hub refused with status {status}" + (f" ({told})" if told else ""))


def _line(text: str) -> str:
    """The first line, without web addresses and tokens."""
    token = get_token()
    line = (text.strip().splitlines() or [""])[0].rstrip(".")
    line = re.sub(r"https?://\S+", "[address]", line)
    line = re.sub(r"hf_\w{8,}", "hf_***", line)
    return line.replace(token, "***") if token else line
