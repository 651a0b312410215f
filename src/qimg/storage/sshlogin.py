"""Connecting to an SSH server, being sure that it is the right one, and logging in."""

from __future__ import annotations

import binascii
import errno
import os
import socket

import asyncssh

from qimg.errors import StorageError
from qimg.storage.ssh import HASH, NONE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.storage.ssh import HostKeyCheck, Place

#: Seconds for the connection, and for all until the login is done.
_CONNECT_TIMEOUT = 30
_LOGIN_TIMEOUT = 60
#: A server that shows no sign of life for so many intervals of so many seconds is gone.
_KEEPALIVE_INTERVAL, _KEEPALIVE_COUNT = 15, 4
#: Quickest first.
_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "chacha20-poly1305@openssh.com", "aes256-ctr")
#: Bytes of one message from the server; the usual 32 KiB cost it and us one encryption each.
_MAX_PACKET = 256 << 10
_KNOWN_HOSTS = ("~/.ssh/known_hosts", "~/.ssh/known_hosts2", "/etc/ssh/ssh_known_hosts")
_NO_LOGIN = "failed to authenticate using publickey authentication and the identities held by your ssh-agent"
_MAX_WORDS = 200


class _Client(asyncssh.SSHClient):
    """Compares the server's key with a fingerprint. `refusal`: why it is not accepted."""

    def __init__(self, check: HostKeyCheck) -> None:
        self._check = check
        self.refusal = ""

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        check = self._check
        found = _fingerprint(key, check.type)
        if check.accepts(found):
            return True
        self.refusal = (
            f"remote host {key.get_algorithm()} key fingerprint '{check.type}:{found}'"
            f" does not match host_key_check '{check.type}:{check.digest}'"
        )
        return False


def _fingerprint(key: asyncssh.SSHKey, kind: str) -> str:
    """The md5, sha1 or sha256 of a public key in hexadecimal digits."""
    text = key.get_fingerprint(kind).partition(":")[2]
    if kind == "md5":
        return text.replace(":", "")
    return binascii.a2b_base64(text + "=" * (-len(text) % 4)).hex()


async def connect(place: Place) -> asyncssh.SSHClientConnection:
    """A connection on which the user is logged in. Raises StorageError."""
    client = _Client(place.check)
    known = None if place.check.mode in (NONE, HASH) else _known_hosts()
    try:
        return await asyncssh.connect(
            place.host,
            place.port,
            username=place.user,
            client_factory=lambda: client,
            known_hosts=((), (), ()) if place.check.mode == HASH else known,
            config=None,
            preferred_auth="publickey",
            encryption_algs=_CIPHERS,
            compression_algs=("none",),
            max_pktsize=_MAX_PACKET,
            connect_timeout=_CONNECT_TIMEOUT,
            login_timeout=_LOGIN_TIMEOUT,
            keepalive_interval=_KEEPALIVE_INTERVAL,
            keepalive_count_max=_KEEPALIVE_COUNT,
        )
    except asyncssh.HostKeyNotVerifiable as error:
        raise _denied(client.refusal or _stranger(place, known)) from error
    except asyncssh.PermissionDenied as error:
        raise _denied(_NO_LOGIN) from error
    except (asyncssh.Error, BrokenPipeError, ConnectionResetError) as error:
        raise _denied(f"failed to establish SSH session: {printable(error)}") from error
    except socket.gaierror as error:
        message = f"address resolution failed for {place.host}:{place.port}: {error.strerror}"
        raise StorageError(message, errno=errno.EINVAL) from error
    except OSError as error:
        number = error.errno or (errno.ETIMEDOUT if isinstance(error, TimeoutError) else errno.ECONNREFUSED)
        message = f"Failed to connect to '{place.host}:{place.port}': {os.strerror(number)}"
        raise StorageError(message, errno=number) from error


def printable(error: Exception) -> str:
    """What an error says, fit for a terminal: a server may have chosen the words."""
    words = getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
    words = words or type(error).__name__
    return "".join(letter if letter.isprintable() else "?" for letter in words[:_MAX_WORDS])


def _denied(message: str) -> StorageError:
    return StorageError(message, errno=errno.EACCES)


def _known_hosts() -> asyncssh.SSHKnownHosts:
    files = [os.path.expanduser(name) for name in _KNOWN_HOSTS]
    try:
        return asyncssh.read_known_hosts([name for name in files if os.path.exists(name)])
    except (OSError, ValueError) as error:
        raise _denied(f"known_hosts cannot be read: {printable(error)}") from error


def _stranger(place: Place, known: asyncssh.SSHKnownHosts | None) -> str:
    """Why a server is not trusted: nobody knows its key, or it has another one than it should have."""
    assert known is not None
    keys = asyncssh.match_known_hosts(known, place.host, "", place.port)
    if not any(keys):
        return "no host key was found in known_hosts"
    return "host key does not match the one in known_hosts; this may be a possible attack"
