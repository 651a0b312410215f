"""``--object``: secrets and other helpers, checked and put into the context (common sheet, section 8)."""

from __future__ import annotations

from qimg.cli.common import Leave, Session
from qimg.errors import OptionError, QimgError
from qimg.options import parse_bool, split_pairs

_ID_HINT = "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."
_CREDENTIALS = {
    "dir": "string",
    "endpoint": "QCryptoTLSCredsEndpoint",
    "priority": "string",
    "verify-peer": "bool",
}
_SECRET = {"format": "QCryptoSecretFormat", "iv": "string", "keyid": "string"}
_LIMITS = (
    "bps-read bps-read-max bps-read-max-length bps-total bps-total-max bps-total-max-length bps-write "
    "bps-write-max bps-write-max-length iops-read iops-read-max iops-read-max-length iops-size iops-total "
    "iops-total-max iops-total-max-length iops-write iops-write-max iops-write-max-length"
)

#: type -> property -> kind. Kinds other than string, int, bool, any are names of ENUMS.
TYPES: dict[str, dict[str, str]] = {
    "authz-list": {"policy": "QAuthZListPolicy", "rules": "any"},
    "authz-list-file": {"filename": "string", "refresh": "bool"},
    "authz-simple": {"identity": "string"},
    "main-loop": {"aio-max-batch": "int", "thread-pool-max": "int", "thread-pool-min": "int"},
    "secret": {"data": "string", "file": "string", **_SECRET},
    "secret_keyring": {**_SECRET, "serial": "int"},
    "throttle-group": {"limits": "any", **{f"x-{name}": "int" for name in _LIMITS.split()}},
    "tls-cipher-suites": {"dir": "string", "endpoint": "QCryptoTLSCredsEndpoint", "priority": "string"},
    "tls-creds-anon": _CREDENTIALS,
    "tls-creds-psk": {**_CREDENTIALS, "username": "string"},
    "tls-creds-x509": {**_CREDENTIALS, "passwordid": "string", "sanity-check": "bool"},
}
ENUMS = {
    "QAuthZListPolicy": ("deny", "allow"),
    "QCryptoSecretFormat": ("raw", "base64"),
    "QCryptoTLSCredsEndpoint": ("client", "server"),
}
_REQUIRED = {"authz-simple": "identity", "authz-list-file": "filename", "secret_keyring": "serial"}
#: Types of the emulator that no image tool has a use for.
_ELSEWHERE = (
    "can-bus",
    "can-host-socketcan",
    "colo-compare",
    "cryptodev-backend",
    "dbus-vmstate",
    "filter-buffer",
    "filter-dump",
    "filter-mirror",
    "filter-redirector",
    "filter-replay",
    "filter-rewriter",
    "input-barrier",
    "input-linux",
    "iothread",
    "memory-backend-epc",
    "memory-backend-file",
    "memory-backend-memfd",
    "memory-backend-ram",
    "rng-builtin",
    "rng-egd",
    "rng-random",
    "sev-guest",
    "x-remote-object",
)
_EXPECTED = {"string": (str, "string"), "int": (int, "integer"), "bool": (bool, "boolean")}


class UserObject:
    """An object of ``--object``: its `type`, `id`, `properties`, and what a secret holds (`data`)."""

    __slots__ = ("data", "id", "properties", "type")

    def __init__(self, type: str, id: str, properties: dict[str, object]) -> None:
        self.type = type
        self.id = id
        self.properties = properties
        self.data: bytes | None = None


def add_object(session: Session, text: str) -> None:
    """Create the object that `text` describes in the session's context, or print help and leave.

    Raises OptionError and other QimgErrors in the words of the real program."""
    if _print_help(session, text):
        raise Leave
    made = make_object(text, session.context.objects)
    session.context.objects[made.id] = made


def _print_help(session: Session, text: str) -> bool:
    elements = [] if text.startswith("{") else split_pairs(text)
    if not any(value is None and name in ("help", "?") for name, value in elements):
        return False
    properties = TYPES.get(elements[0][0])
    if properties is None:
        lines = ["List of user creatable objects:", *(f"  {name}" for name in sorted(TYPES))]
    else:
        lines = [
            f"{elements[0][0]} options:",
            *(f"  {name}=<{of}>" for name, of in sorted(properties.items())),
        ]
    session.console.out("\n".join(lines) + "\n")
    return True


def make_object(text: str, known: dict[str, object]) -> UserObject:
    """Parse and check one description; `known` are the objects made before. Raises QimgError."""
    json_form = text.startswith("{")
    fields = _json_fields(text) if json_form else _key_values(text)
    kind = _identity(fields, "qom-type")
    if kind in _ELSEWHERE:
        raise OptionError(f"invalid object type: {kind}", option="qom-type")
    if kind not in TYPES:
        raise OptionError(f"Parameter 'qom-type' does not accept value '{kind}'", option="qom-type")
    id = _identity(fields, "id")
    properties = _check_properties(kind, fields, json_form)
    if not _well_formed(id):
        raise OptionError("Parameter 'id' expects an identifier", option="id", hint=_ID_HINT)
    made = UserObject(kind, id, properties)
    if kind == "secret":
        made.data = _secret_data(properties, known)
    elif kind == "secret_keyring":
        raise OptionError("Secrets in the kernel's keyring are not supported yet", option="qom-type")
    elif kind.startswith("tls-"):
        _check_credentials(kind, properties)
    if id in known:
        raise OptionError(
            f"attempt to add duplicate property '{id}' to object (type 'container')", option="id"
        )
    return made


def _well_formed(id: str) -> bool:
    return id.isascii() and id[:1].isalpha() and all(c.isalnum() or c in "-._" for c in id)


def _identity(fields: dict[str, object], name: str) -> str:
    if name not in fields:
        raise OptionError(f"Parameter '{name}' is missing", option=name)
    value = fields.pop(name)
    if not isinstance(value, str):
        raise OptionError(f"Invalid parameter type for '{name}', expected: string", option=name)
    return value


def _json_fields(text: str) -> dict[str, object]:
    import json

    decoder = json.JSONDecoder()
    try:
        value, end = decoder.raw_decode(text)
    except (ValueError, RecursionError) as error:
        at_end = isinstance(error, json.JSONDecodeError) and not text[error.pos :].strip()
        reason = "premature EOI" if at_end else f"invalid text '{text[:40]}'"
        raise OptionError(f"JSON parse error, {reason}") from None
    if text[end:].strip():
        raise OptionError("Expecting at most one JSON value")
    assert isinstance(value, dict)
    return value


def _key_values(text: str) -> dict[str, object]:
    """``TYPE,key=value,...``; the first element may leave out ``qom-type=``. Later duplicates win."""
    fields: dict[str, object] = {}
    rest = text
    while rest:
        comma, equals = rest.find(","), rest.find("=")
        if equals < 0 or 0 <= comma < equals:
            name, _, rest = rest.partition(",")
            if fields or not name:
                raise OptionError(
                    f"Expected '=' after parameter '{name}'" if name else "Invalid parameter ''"
                )
            fields["qom-type"] = name
            continue
        name, rest = rest[:equals], rest[equals + 1 :]
        value = ""
        while rest:
            part, comma_sign, rest = rest.partition(",")
            value += part
            if not comma_sign or not rest.startswith(","):
                break
            value += ","
            rest = rest[1:]
        if not name:
            raise OptionError("Invalid parameter ''")
        fields[name] = value
    return fields


def _check_properties(kind: str, fields: dict[str, object], json_form: bool) -> dict[str, object]:
    table = TYPES[kind]
    required = _REQUIRED.get(kind)
    if required is not None and required not in fields:
        raise OptionError(f"Parameter '{required}' is missing", option=required)
    checked: dict[str, object] = {}
    for name, value in fields.items():
        head, dot, _ = name.partition(".")
        if table.get(head if dot else name) == "any":
            checked[name] = value
        elif dot:
            raise OptionError(f"Parameters '{head}.*' are unexpected", option=name)
        elif name in table:
            checked[name] = _check_value(name, table[name], value, json_form)
    for name in fields:
        if name not in checked:
            raise OptionError(f"Parameter '{name}' is unexpected", option=name)
    return checked


def _check_value(name: str, kind: str, value: object, json_form: bool) -> object:
    allowed = ENUMS.get(kind)
    wanted, said = _EXPECTED["string" if allowed else kind]
    if json_form:
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise OptionError(f"Invalid parameter type for '{name}', expected: {said}", option=name)
    elif kind == "bool":
        return parse_bool(name, str(value))
    elif kind == "int":
        try:
            return int(str(value), 0)
        except ValueError:
            raise OptionError(f"Parameter '{name}' expects integer", option=name) from None
    if allowed and value not in allowed:
        raise OptionError(f"Parameter '{name}' does not accept value '{value}'", option=name)
    return value


def _secret_data(properties: dict[str, object], known: dict[str, object]) -> bytes:
    """The bytes of a secret; a file is taken byte for byte in raw format."""
    data, file = properties.get("data"), properties.get("file")
    if data is not None and file is not None:
        raise OptionError("'file' and 'data' are mutually exclusive")
    if data is None and file is None:
        raise OptionError("Either 'file' or 'data' must be provided")
    content = str(data).encode("utf-8", "surrogateescape") if file is None else _read_secret(str(file))
    if "keyid" in properties:
        master = known.get(str(properties["keyid"]))
        if not isinstance(master, UserObject) or master.type != "secret":
            raise OptionError(f"No secret with id '{properties['keyid']}'", option="keyid")
        raise OptionError(
            "Secrets encrypted with another one ('keyid') are not supported yet", option="keyid"
        )
    if properties.get("format") == "base64":
        return _decode_base64(content)
    return content


def _read_secret(name: str) -> bytes:
    try:
        with open(name, "rb") as file:
            return file.read(1 << 20)
    except OSError as error:
        raise QimgError(
            f"Unable to read {name}: Failed to open file \u201c{name}\u201d: {error.strerror}"
        ) from error


def _decode_base64(content: bytes) -> bytes:
    import binascii

    letters = content.translate(None, b"\r\n")
    if letters.strip(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="):
        raise OptionError("Base64 data contains invalid characters")
    try:
        return binascii.a2b_base64(letters[: len(letters) // 4 * 4])
    except binascii.Error:
        raise OptionError("Base64 data is not padded as it should be") from None


def _check_credentials(kind: str, properties: dict[str, object]) -> None:
    """What can be said of TLS credentials before a connection uses them."""
    import os

    if kind == "tls-cipher-suites":
        if "priority" not in properties:
            raise OptionError("'priority' property is not set", option="priority")
        return
    needed = {"tls-creds-x509": "ca-cert.pem", "tls-creds-psk": "keys.psk"}.get(kind)
    if needed is None:
        return
    if "dir" not in properties:
        raise OptionError("Missing 'dir' property value", option="dir")
    path = f"{properties['dir']}/{needed}"
    try:
        os.stat(path)
    except OSError as error:
        raise QimgError(f"Unable to access credentials {path}: {error.strerror}") from error
