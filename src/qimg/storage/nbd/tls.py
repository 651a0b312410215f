"""TLS for NBD: what objects ``tls-creds-x509`` and ``tls-creds-psk`` mean to Python's ssl."""

from __future__ import annotations

import errno
import os

from qimg.errors import NotSupported, OptionError, StorageError
from qimg.storage.nbd.channel import Channel, NbdError, TlsChannel

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

    from qimg.context import Context

_MAX_KEYS = 1 << 20


def starter(
    context: Context, credentials: str | None, directory: str | None, hostname: str | None, timeout: float
) -> Callable[[Channel], Channel]:
    """What makes a channel with TLS of one without: by the object called `credentials`, or else with the
    certificates in `directory`, or those of the system. `hostname`: whom the server has to prove to be.

    Raises OptionError, NotSupported, StorageError."""
    if credentials is not None:
        session, needs_name = _from_object(context, credentials)
    else:
        session, needs_name = _x509(directory, None), True
    if needs_name and hostname is None:
        raise NbdError("No hostname for certificate validation", errno=errno.EINVAL)

    def start(plain: Channel) -> Channel:
        return TlsChannel(plain, session, hostname if needs_name else None, timeout)

    return start


def _from_object(context: Context, name: str) -> tuple[ssl.SSLContext, bool]:
    """The session's settings by the object called `name`, and whether a name is checked."""
    found = context.objects.get(name)
    if found is None:
        raise OptionError(f"No TLS credentials with id '{name}'", option="tls-creds")
    kind = getattr(found, "type", "")
    if not kind.startswith("tls-creds-"):
        raise OptionError(f"Object with id '{name}' is not TLS credentials", option="tls-creds")
    properties: dict[str, object] = getattr(found, "properties", {})
    if properties.get("endpoint", "client") != "client":
        raise OptionError("Expected TLS credentials for a client endpoint", option="tls-creds")
    if properties.get("priority"):
        raise NotSupported("Priorities of GnuTLS are not supported")
    if kind == "tls-creds-psk":
        return _psk(f"{properties['dir']}/keys.psk", str(properties.get("username", "qemu"))), False
    if kind != "tls-creds-x509":
        raise NotSupported("TLS without certificates is not supported")
    secret = properties.get("passwordid")
    password = None if secret is None else context.secret(str(secret))
    verify = bool(properties.get("verify-peer", True))
    session = _x509(str(properties["dir"]), password, verify=verify)
    return session, verify


def _x509(directory: str | None, password: bytes | None, *, verify: bool = True) -> ssl.SSLContext:
    """Certificates by the names that the real program has for them in `directory`."""
    import ssl

    session = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    session.minimum_version = ssl.TLSVersion.TLSv1_2
    if not verify:
        session.check_hostname = False
        session.verify_mode = ssl.CERT_NONE
    if directory is None:
        session.load_default_certs()
        return session
    path = f"{directory}/ca-cert.pem"
    try:
        session.load_verify_locations(path)
        path = f"{directory}/ca-crl.pem"
        if os.path.exists(path):
            session.load_verify_locations(path)
            session.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
        path = f"{directory}/client-cert.pem"
        if os.path.exists(path):
            key = f"{directory}/client-key.pem"
            session.load_cert_chain(path, key, password=password if password is not None else b"")
    except ssl.SSLError as error:
        raise _unreadable(path, str(error.reason or error)) from error
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    return session


def _unreadable(path: str, reason: str) -> StorageError:
    return StorageError(f"Unable to access credentials {path}: {reason}", errno=errno.EACCES)


def _psk(path: str, username: str) -> ssl.SSLContext:
    """A key that both sides know. Raises NotSupported before Python 3.13."""
    import ssl

    session = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    session.check_hostname = False
    session.verify_mode = ssl.CERT_NONE
    if not hasattr(session, "set_psk_client_callback"):
        raise NotSupported("TLS with pre-shared keys needs Python 3.13 or newer")
    session.set_ciphers("PSK")
    key = _find_key(path, username)
    session.set_psk_client_callback(lambda _hint: (username, key))
    return session


def _find_key(path: str, username: str) -> bytes:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read(_MAX_KEYS).splitlines()
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    for line in lines:
        name, _, key = line.strip().partition(":")
        if name == username:
            try:
                return bytes.fromhex(key)
            except ValueError:
                break
    raise OptionError(f"PSK for user '{username}' not found in {path}", option="username")
