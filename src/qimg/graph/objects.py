"""``--object``: secrets and other helpers that images need, from their descriptions (common sheet 8).

A description is ``TYPE,id=ID,key=value...`` or a JSON object. What a type takes is data: TYPES.
"""

from __future__ import annotations

import os

from qimg.context import Secret
from qimg.errors import OptionError, StorageError
from qimg.graph.location import ID_HINT, is_identifier
from qimg.options import parse_bool

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.graph.jsonopts import Json
    from qimg.storage.filters.throttle import ThrottleGroup

    # A kind: "string", "int", "int32", "bool", a key of ENUMS, a structure, or a list of one of these.
    Structure = dict[str, object]

ENUMS = {
    "QAuthZListFormat": ("exact", "glob"),
    "QAuthZListPolicy": ("deny", "allow"),
    "QCryptoSecretFormat": ("raw", "base64"),
    "QCryptoTLSCredsEndpoint": ("client", "server"),
}

_LIMITS = [
    f"{what}-{way}{more}"
    for what in ("bps", "iops")
    for way in ("read", "total", "write")
    for more in ("", "-max", "-max-length")
]
_LIMITS.append("iops-size")
_CREDENTIALS: Structure = {
    "dir": "string",
    "endpoint": "QCryptoTLSCredsEndpoint",
    "priority": "string",
    "verify-peer": "bool",
}
_SECRET: Structure = {"format": "QCryptoSecretFormat", "iv": "string", "keyid": "string"}
_RULE: Structure = {"match": "string", "policy": "QAuthZListPolicy", "format": "QAuthZListFormat"}

#: type -> property -> kind. A kind in a list means a list of it.
TYPES: dict[str, Structure] = {
    "authz-list": {"policy": "QAuthZListPolicy", "rules": [_RULE]},
    "authz-list-file": {"filename": "string", "refresh": "bool"},
    "authz-simple": {"identity": "string"},
    "main-loop": {"aio-max-batch": "int", "thread-pool-max": "int", "thread-pool-min": "int"},
    "pr-manager-helper": {"path": "string"},
    "secret": {"data": "string", "file": "string", **_SECRET},
    "secret_keyring": {**_SECRET, "serial": "int32"},
    "thread-context": {"cpu-affinity": ["int"], "node-affinity": ["int"]},
    "throttle-group": {
        "limits": dict.fromkeys(_LIMITS, "int"),
        **{f"x-{name}": "int" for name in _LIMITS},
    },
    "tls-cipher-suites": _CREDENTIALS,
    "tls-creds-anon": _CREDENTIALS,
    "tls-creds-psk": {**_CREDENTIALS, "username": "string"},
    "tls-creds-x509": {**_CREDENTIALS, "passwordid": "string", "sanity-check": "bool"},
}
_REQUIRED = {"identity", "serial", "filename", "match", "path", "policy"}
_SHOWN = {
    "cpu-affinity": "int",
    "limits": "ThrottleLimits",
    "node-affinity": "int",
    "rules": "QAuthZListRule",
    "serial": "int32_t",
}
_SECRETS = ("secret", "secret_keyring")

#: Types of the emulator that no image tool has a use for.
_ELSEWHERE = frozenset(
    (
        *("authz-pam", "can-bus", "can-host-socketcan", "colo-compare", "cryptodev-backend"),
        *("cryptodev-backend-builtin", "cryptodev-backend-lkcf", "cryptodev-vhost-user"),
        *("dbus-vmstate", "filter-buffer", "filter-dump", "filter-mirror"),
        *("filter-redirector", "filter-replay", "filter-rewriter", "input-barrier", "input-linux"),
        *("iothread", "memory-backend-epc", "memory-backend-file", "memory-backend-memfd"),
        *("memory-backend-ram", "pef-guest", "rng-builtin", "rng-egd", "rng-random", "s390-pv-guest"),
        *("sev-guest", "x-remote-object", "x-vfio-user-server"),
    )
)

_JSON_TYPES = {
    "string": (str, "string"),
    "int": (int, "integer"),
    "int32": (int, "integer"),
    "bool": (bool, "boolean"),
}


class UserObject:
    """One object: its `type`, `id`, `properties` (typed values); `data`: the bytes of a secret; `group`: the
    limits of a throttle-group, which all nodes that name it share."""

    __slots__ = ("data", "group", "id", "properties", "type")

    def __init__(self, type: str, id: str, properties: dict[str, object], data: bytes | None = None) -> None:
        self.type = type
        self.id = id
        self.properties = properties
        self.data = data
        self.group: ThrottleGroup | None = None


def add_object(text: str, objects: dict[str, object]) -> UserObject:
    """Make the object that `text` describes and add it to `objects`, where what it refers to must be already.

    Raises QimgError subclasses with the words of the real program."""
    by_json = text.startswith("{")
    given = _from_json(text) if by_json else _from_pairs(text)
    kind = _string(given, "qom-type")
    if kind not in TYPES and kind not in _ELSEWHERE:
        raise OptionError(f"Parameter 'qom-type' does not accept value '{kind}'", option="qom-type")
    id = _string(given, "id")
    if kind in _ELSEWHERE:
        raise OptionError(f"invalid object type: {kind}", option="qom-type")
    properties = _check(TYPES[kind], given, "", by_json)
    if not is_identifier(id):
        raise OptionError("Parameter 'id' expects an identifier", option="id", hint=ID_HINT)
    if id in objects:
        raise OptionError(
            f"attempt to add duplicate property '{id}' to object (type 'container')", option="id"
        )
    made = objects[id] = UserObject(kind, id, properties)
    try:
        _complete(made, objects)
    except BaseException:
        del objects[id]
        raise
    return made


def secret(objects: dict[str, object], id: str) -> bytes:
    """The bytes of the secret called `id`. Raises OptionError."""
    found = objects.get(id)
    if isinstance(found, UserObject) and found.type not in _SECRETS:
        raise OptionError(f"Object with id '{id}' is not a secret", option="id")
    if not isinstance(found, UserObject | Secret):
        raise OptionError(f"No secret with id '{id}'", option="id")
    if found.data is None:
        raise OptionError(f"Secret with id '{id}' has no data", option="id")
    return found.data


def help_lines(text: str) -> list[str] | None:
    """The lines to print where `text` asks for help (an element ``help`` or ``?``), else None."""
    if text.startswith("{"):
        return None
    words = text.replace(",,", "\0").split(",")
    if "help" not in words and "?" not in words:
        return None
    kind = words[0].removeprefix("qom-type=")
    if kind not in TYPES:
        return ["List of user creatable objects:", *(f"  {name}" for name in sorted(TYPES))]
    rows = [f"  {name}=<{_SHOWN.get(name, of)}>" for name, of in TYPES[kind].items()]
    return [f"{kind} options:", *sorted(rows)]


# -- reading descriptions


def _from_json(text: str) -> dict[str, Json]:
    from qimg.graph import jsonopts

    value = jsonopts.parse(text)
    assert isinstance(value, dict)
    return value


def _from_pairs(text: str) -> dict[str, Json]:
    """``TYPE,key=value,...``, dotted keys nested; of duplicates the last wins. Raises OptionError."""
    flat: dict[str, str] = {}
    rest = text
    first = True
    while rest:
        comma, equals = rest.find(","), rest.find("=")
        comma = len(rest) if comma < 0 else comma
        if first and comma and not 0 <= equals < comma:
            key, value, rest = "qom-type", rest[:comma], rest[comma + 1 :]
            if rest.startswith(","):
                raise OptionError("Invalid parameter ''")
        else:
            key = rest[: min(comma, equals) if equals >= 0 else comma]
            if not _well_formed(key):
                raise OptionError(f"Invalid parameter '{key}'", option=key)
            if not rest.startswith("=", len(key)):
                raise OptionError(f"Expected '=' after parameter '{key}'", option=key)
            value, rest = _value(rest[len(key) + 1 :])
        flat[key] = value
        first = False
    return _nest(flat)


def _well_formed(key: str) -> bool:
    """Names joined by dots, each a letter and more of ``A-Za-z0-9-_``, or after the first all digits."""
    for index, name in enumerate(key.split(".")):
        if index and name.isdigit() and name.isascii():
            continue
        if not (name.isascii() and name[:1].isalpha() and name.replace("-", "").replace("_", "").isalnum()):
            return False
    return True


def _value(text: str) -> tuple[str, str]:
    """A value (``,,`` is a literal comma) and what follows its comma."""
    parts = ""
    while True:
        part, comma, text = text.partition(",")
        parts += part
        if not comma or not text.startswith(","):
            return parts, text
        parts += ","
        text = text[1:]


def _nest(flat: dict[str, str]) -> dict[str, Json]:
    nested: dict[str, Json] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        inside = nested
        for name in path:
            below = inside.setdefault(name, {})
            if not isinstance(below, dict):
                raise OptionError(f"Parameters '{key.rpartition('.')[0]}.*' used inconsistently", option=key)
            inside = below
        inside[last] = value
    return nested


# -- checking against TYPES

_NO_INTEGER = 1 << 63


def _string(given: dict[str, Json], name: str) -> str:
    if name not in given:
        raise OptionError(f"Parameter '{name}' is missing", option=name)
    value = given.pop(name)
    if not isinstance(value, str):
        raise OptionError(f"Invalid parameter type for '{name}', expected: string", option=name)
    return value


def _check(structure: Structure, given: dict[str, Json], path: str, by_json: bool) -> dict[str, object]:
    """The typed values of `given`. `path`: the dotted name of what is checked, ending in a dot or empty."""
    typed: dict[str, object] = {}
    for name, kind in structure.items():
        full = path + name
        if name in given:
            typed[name] = _check_value(kind, given[name], full, by_json)
        elif name in _REQUIRED and (path or name != "policy"):
            raise OptionError(f"Parameter '{full}' is missing", option=full)
    for name in given:
        if name not in structure:
            raise OptionError(f"Parameter '{path}{name}' is unexpected", option=path + name)
    return typed


def _check_value(kind: object, value: Json, name: str, by_json: bool) -> object:
    if isinstance(kind, dict):
        if not isinstance(value, dict):
            raise _wrong_type(name, "object")
        return _check(kind, value, name + ".", by_json)
    if isinstance(kind, list):
        return [
            _check_value(kind[0], member, f"{name}.{index}", by_json)
            for index, member in enumerate(_members(value, name))
        ]
    assert isinstance(kind, str)
    allowed = ENUMS.get(kind)
    if by_json:
        wanted, said = _JSON_TYPES["string" if allowed else kind]
        if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
            raise _wrong_type(name, said)
    elif not isinstance(value, str):
        raise OptionError(f"Parameters '{name}.*' are unexpected", option=name)
    elif kind == "bool":
        return parse_bool(name, value)
    elif kind in ("int", "int32"):
        value = _integer(name, value)
    if kind == "int32" and isinstance(value, int) and not -(1 << 31) <= value < 1 << 31:
        raise OptionError(f"Parameter '{name}' expects int32_t", option=name)
    if allowed and value not in allowed:
        last = name.rpartition(".")[2]
        raise OptionError(f"Parameter '{last}' does not accept value '{value}'", option=name)
    return value


def _members(value: Json, name: str) -> list[Json]:
    """A list, or an object whose keys are 0, 1, 2 ..."""
    if isinstance(value, list):
        return value
    if isinstance(value, dict) and all(str(index) in value for index in range(len(value))):
        return [value[str(index)] for index in range(len(value))]
    raise _wrong_type(name, "array")


def _wrong_type(name: str, expected: str) -> OptionError:
    return OptionError(f"Invalid parameter type for '{name}', expected: {expected}", option=name)


def _integer(name: str, text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        value = _NO_INTEGER
    if not -(1 << 63) <= value < 1 << 63:
        raise OptionError(f"Parameter '{name}' expects integer", option=name)
    return value


# -- making objects


def _complete(made: UserObject, objects: dict[str, object]) -> None:
    """What a type does with its properties when it is made. Raises QimgError."""
    if made.type in _SECRETS:
        from qimg.graph.secret import secret_bytes

        made.data = secret_bytes(made.type, made.properties, lambda other: secret(objects, other))
    elif made.type == "throttle-group":
        from qimg.graph.throttle import checked_limits
        from qimg.storage.filters.throttle import ThrottleGroup

        made.group = ThrottleGroup(checked_limits(made.properties))
    elif made.type == "pr-manager-helper":
        _connect(str(made.properties["path"]))
    elif made.type == "tls-cipher-suites":
        if "priority" not in made.properties:
            raise OptionError("'priority' property is not set", option="priority")
    elif made.type == "tls-creds-x509":
        _check_credentials(made.properties, "ca-cert.pem")
    elif made.type == "tls-creds-psk":
        _check_credentials(made.properties, "keys.psk")


def _check_credentials(properties: dict[str, object], needed: str) -> None:
    """Whether the directory has the file without which no connection is possible."""
    if "dir" not in properties:
        raise OptionError("Missing 'dir' property value", option="dir")
    path = f"{properties['dir']}/{needed}"
    try:
        os.stat(path)
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None) or 22
        message = f"Unable to access credentials {path}: {os.strerror(number)}"
        raise StorageError(message, errno=number) from error


def _connect(path: str) -> None:
    """Whether somebody listens at this socket. Nothing that an image tool does needs more of it."""
    import socket

    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(path)
        except (OSError, ValueError) as error:
            number = getattr(error, "errno", None) or 22
            message = f"Failed to connect to '{path}': {os.strerror(number)}"
            raise StorageError(message, errno=number) from error
