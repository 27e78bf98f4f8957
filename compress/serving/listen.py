"""What can be settled before a model is loaded: the key, and the address."""

import errno
import ipaddress
import os
import socket
from pathlib import Path

from compress.calibrate.errors import InputError

_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def read_key(path: Path) -> str:
    """The API key in a file, without the line's end.

    Raises:
        InputError: the file can't be read, or doesn't hold one line that can stand in a header.
    """
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        problem = error.strerror if isinstance(error, OSError) else "isn't plain ASCII text"
        raise InputError("--api-key-file", path, f"can't be read: {problem}") from error
    if not key or not all(character.isprintable() and character != " " for character in key):
        raise InputError("--api-key-file", path, "has to hold one key, on one line and without spaces")
    return key


def is_loopback(address: str) -> bool:
    """Whether an IP address means this machine alone; a name isn't one."""
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """A TCP socket at an address, which nobody can connect to until it listens; port 0 is any that is free.

    Raises:
        InputError: no such host, or the port is taken or not allowed.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise InputError("--host", host, "is not an address of this machine") from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere the option lets two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        option, value = ("--host", host) if error.errno in _NOT_HERE else ("--port", port)
        raise InputError(
            option, value, f"can't be served at: {error.strerror}", fix="--port 0 takes any port that is free"
        ) from error
    return listener
