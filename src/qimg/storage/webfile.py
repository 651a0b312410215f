"""What files on web servers (http, https, ftp, ftps) have in common: read only, by ranges, over connections
that break (protocols sheet 2).

A `Session` makes the transfers of one protocol; a `WebFile` hands sessions to the threads that read, begins
again where a transfer broke off, and keeps the blocks that small reads come from. Whatever a server says of
the file must stay as it was when the file was opened: a file that changes meanwhile is an error, never a
mixture.
"""

# ruff: noqa: ARG003  (the interface of Storage)
from __future__ import annotations

import errno
import time

from qimg.errors import LocationError, NotSupported, OptionError, StorageError
from qimg.options import BOOL, NUM, SIZE, STR, Option
from qimg.storage.base import Limits, Storage
from qimg.storage.blockcache import BlockCache
from qimg.units import KIB, MIB, SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ssl import SSLContext
    from typing import ClassVar, Self

    from qimg.context import Context
    from qimg.options import Value
    from qimg.storage.base import Buffer

_READAHEAD = 256 * KIB
#: However much a user wants read ahead, one block of it has to fit into memory many times.
_MAX_BLOCK = 8 * MIB
_TIMEOUT = 5
_MAX_TIMEOUT = 10000
#: Seconds before each further try after transfers that brought nothing; the first one is a connection that
#: the server had given up.
_PAUSES = (0.0, 0.1, 0.4, 1.0)
#: A transfer that brought so much was worth it, and the tries are counted anew.
_PROGRESS = 64 * KIB
#: Slower than this, in bytes a second, nothing is coming.
_SLOWEST = KIB


class Interrupted(Exception):
    """A transfer that may go better when it is tried again. `words`: why, without credentials.

    `wait`: seconds for which the server wants to be left alone; `connected`: it has answered."""

    def __init__(self, words: str, *, wait: float = 0, connected: bool = True) -> None:
        super().__init__(words)
        self.words = words
        self.wait = wait
        self.connected = connected


class Facts:
    """What tells one state of a file from another: its `size` in bytes, and a `tag` that the server chose."""

    __slots__ = ("size", "tag")

    def __init__(self, size: int, tag: str | None) -> None:
        self.size = size
        self.tag = tag

    def check(self, now: Facts) -> None:
        """Raise StorageError unless `now` may still be the same file."""
        if (now.size, now.tag) != (self.size, self.tag):
            raise failed("The file changed while it was read")


class Access:
    """Where a file is and how to get at it. Login and proxy are (user, password) or None.

    url         as the user wrote it.
    timeout     seconds without a byte after which a server counts as gone; None: no limit.
    verify      whether certificates are checked.
    cookie      sent as it is, or None.
    """

    __slots__ = ("_tls", "cookie", "login", "proxy_login", "timeout", "url", "verify")

    def __init__(self, url: str, values: dict[str, Value], context: Context | None) -> None:
        self.url = url
        self.verify = bool(values.get("sslverify", True))
        self.login = _login(values, "", context)
        self.proxy_login = _login(values, "proxy-", context)
        self.cookie = _cookie(values, context)
        seconds = int(values.get("timeout", _TIMEOUT))
        if not 0 <= seconds <= _MAX_TIMEOUT:
            raise OptionError("timeout parameter is too large or negative", option="timeout")
        self.timeout: float | None = seconds or None
        self._tls: SSLContext | None = None

    def tls(self) -> SSLContext:
        """How TLS is spoken: certificates checked against the system's, or not at all."""
        if self._tls is None:
            import ssl

            context = ssl.create_default_context()
            if not self.verify:
                context.check_hostname = False
                context.verify_mode = ssl.CERT_NONE
            self._tls = context
        return self._tls


def _secret(name: str, context: Context | None) -> bytes:
    if context is None:
        raise OptionError(f"No secret with id '{name}'")
    return context.secret(name)


def _login(values: dict[str, Value], prefix: str, context: Context | None) -> tuple[bytes, bytes] | None:
    user, secret = values.get(prefix + "username"), values.get(prefix + "password-secret")
    password = b"" if secret is None else _secret(str(secret), context)
    if user is None and secret is None:
        return None
    return str(user or "").encode("utf-8", "surrogateescape"), password


def _cookie(values: dict[str, Value], context: Context | None) -> str | None:
    cookie, secret = values.get("cookie"), values.get("cookie-secret")
    if secret is None:
        return None if cookie is None else str(cookie)
    if cookie is not None:
        raise OptionError("curl driver cannot handle both cookie and cookie secret", option="cookie")
    return _secret(str(secret), context).decode("utf-8", "surrogateescape")


def failed(words: str) -> StorageError:
    """A request that no further try can help."""
    return StorageError(words, errno=errno.EIO)


class Session:
    """What one thread at a time reads a file through: a connection, or some."""

    def __init__(self, access: Access) -> None:
        self.access = access
        #: Known after the first transfer; a `WebFile` compares it with what it knows.
        self.facts: Facts | None = None
        #: The next transfer needs no new session.
        self.alive = True

    def read(self, view: memoryview, offset: int) -> int:
        """Fill `view` from `offset` on; how many bytes that brought: fewer where the file ends or the
        connection broke. Sets `facts`.

        Raises Interrupted where nothing came, StorageError."""
        raise NotImplementedError

    def close(self) -> None:
        """Give its connections up. Never raises."""
        raise NotImplementedError


class Patience:
    """How long a transfer may take: `timeout` seconds for each piece, and never a trickle."""

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._began = time.monotonic()

    def check(self, done: int) -> None:
        """Raise TimeoutError where the `done` bytes so far are too few to wait for the others."""
        if self._timeout is None:
            return
        elapsed = time.monotonic() - self._began
        if elapsed > self._timeout and done < elapsed * _SLOWEST:
            raise TimeoutError


class WebFile(Storage):
    """A file of fixed length on a server, read only."""

    fixed_size = True
    #: Transfers side by side are quicker than one.
    several: ClassVar[bool] = True
    open_options: ClassVar[tuple[Option, ...]] = (
        Option("url", STR, None, "URL of the file"),
        Option("readahead", SIZE, _READAHEAD, "Bytes that small reads fetch at once"),
        Option("timeout", NUM, _TIMEOUT, "Seconds to wait for the server, 0: for ever"),
        Option("username", STR, None, "User name for the server"),
        Option("password-secret", STR, None, "Id of the secret with the password for the server"),
        Option("proxy-username", STR, None, "User name for the proxy"),
        Option("proxy-password-secret", STR, None, "Id of the secret with the password for the proxy"),
        Option("sslverify", BOOL, True, "Check the server's certificate"),
        Option("cookie", STR, None, "Cookie to send"),
        Option("cookie-secret", STR, None, "Id of the secret with the cookie to send"),
    )
    identity: ClassVar[tuple[str, ...]] = (
        "password-secret",
        "url",
        "cookie-secret",
        "proxy-password-secret",
        "proxy-username",
        "driver",
        "username",
        "sslverify",
        "cookie",
    )

    def __init__(self, access: Access, readahead: int) -> None:
        """Connect, and learn the file's length. Raises StorageError."""
        self.access = access
        self.name = access.url
        self.limits = Limits(fast_zero=False, remote=self.several)
        self._facts: Facts | None = None
        self._idle: list[Session] = []
        block = max(SECTOR, min(readahead, _MAX_BLOCK))
        self._cache = BlockCache(self._fetch, block)
        try:
            self._cache.start()
        except StorageError as error:
            self.close()
            raise StorageError(f"CURL: Error opening file: {error}", errno=error.errno) from error

    @classmethod
    def parse(cls, name: str) -> dict[str, Value]:
        return {"url": name}

    @classmethod
    def from_options(
        cls,
        values: dict[str, Value],
        *,
        writable: bool = False,
        create: bool = False,
        cache: str = "writeback",
        discard: bool = True,
        context: Context | None = None,
    ) -> Self:
        if create:
            raise NotSupported(f"Protocol driver '{cls.driver}' does not support image creation")
        if writable:
            raise StorageError("curl driver does not support writes", errno=errno.EROFS)
        readahead = int(values.get("readahead", _READAHEAD))
        if readahead % SECTOR:
            message = f"HTTP_READAHEAD_SIZE {readahead} is not a multiple of 512"
            raise OptionError(message, option="readahead")
        if "url" not in values:
            raise LocationError("curl block driver requires an 'url' option")
        url = str(values["url"])
        if not url.startswith(f"{cls.driver}://"):
            message = f"{cls.driver} curl driver cannot handle the URL '{url}'"
            raise LocationError(f"{message} (does not start with '{cls.driver}://')")
        new = cls(Access(url, values, context), readahead)
        new.named = all(values.get(name, True) is True for name in cls.identity if name != "url")
        return new

    def _session(self) -> Session:
        """A new session; connects when it is used."""
        raise NotImplementedError

    @property
    def size(self) -> int:
        return 0 if self._facts is None else self._facts.size

    def read_into(self, buf: Buffer, offset: int) -> None:
        view = memoryview(buf).cast("B")
        inside = max(0, min(len(view), self.size - offset))
        if inside < len(view):
            view[inside:] = bytes(len(view) - inside)
        try:
            if inside < self._cache.block:
                self._cache.read_into(view[:inside], offset)
            else:
                self._fetch(view[:inside], offset)
        except StorageError as error:
            raise StorageError(error.message, errno=error.errno, offset=offset) from error

    def _fetch(self, view: memoryview, offset: int) -> int:
        """Fill `view` as far as the file goes, beginning again where a transfer broke off; the number
        of bytes that are in it then. Raises StorageError."""
        done = tries = 0
        while self._facts is None or done < min(len(view), self._facts.size - offset):
            try:
                count = self._transfer(view[done:], offset + done)
            except Interrupted as error:
                # The server may have given up the other connections, too.
                self.close()
                if tries == len(_PAUSES) or not (error.connected or self._facts):
                    raise failed(error.words) from error
                time.sleep(max(_PAUSES[tries], min(error.wait, _TIMEOUT)))
                tries += 1
                continue
            done += count
            if count >= _PROGRESS:
                tries = 0
            elif done < len(view) and (tries := tries + 1) > len(_PAUSES):
                raise failed("The server breaks every transfer off")
        return done

    def _transfer(self, view: memoryview, offset: int) -> int:
        """What one transfer brings. Raises Interrupted, StorageError."""
        try:
            session = self._idle.pop()
        except IndexError:
            session = self._session()
        try:
            count = session.read(view, offset)
            assert session.facts is not None
            if self._facts is None:
                self._facts = session.facts
            self._facts.check(session.facts)
        except BaseException:
            session.close()
            raise
        if session.alive:
            self._idle.append(session)
        else:
            session.close()
        return count

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()
