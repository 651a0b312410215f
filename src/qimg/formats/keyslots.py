"""What users say of LUKS encryption: how a new volume is to be encrypted, and how key slots are to change
(luks sheet 4 and 7). Shared by luks and by qcow2, whose options carry the prefix ``encrypt.``."""

from __future__ import annotations

from qimg.errors import OptionError, QimgError
from qimg.options import NUM, STR, Option

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from qimg.context import Context
    from qimg.crypto.luks import LuksHeader, Scheme
    from qimg.options import Value
    from qimg.storage.base import Storage

    Values = dict[str, Value]

#: Milliseconds that unlocking a slot is to take.
ITER_TIME = 2000
KEY_SECRET = "key-secret"


def creation_options(prefix: str = "") -> tuple[Option, ...]:
    """The options that describe a new volume, in the order in which ``Formatting`` prints them."""
    return (
        Option(prefix + "cipher-alg", STR, None, "Name of encryption cipher algorithm"),
        Option(prefix + "cipher-mode", STR, None, "Name of encryption cipher mode"),
        Option(prefix + "ivgen-alg", STR, None, "Name of IV generator algorithm"),
        Option(prefix + "ivgen-hash-alg", STR, None, "Name of IV generator hash algorithm"),
        Option(prefix + "hash-alg", STR, None, "Name of encryption hash algorithm"),
        Option(prefix + "iter-time", NUM, None, "Time to spend in PBKDF in milliseconds"),
    )


def slot_options(prefix: str = "") -> tuple[Option, ...]:
    """The options that `amend` takes."""
    return (
        Option(prefix + "state", STR, None, "Select new state of affected keyslots (active/inactive)"),
        Option(prefix + "keyslot", NUM, None, "Select a single keyslot to modify explicitly"),
        Option(prefix + "old-secret", STR, None, "Select all keyslots that match this password"),
        Option(
            prefix + "new-secret",
            STR,
            None,
            "New secret to set in the matching keyslots. Empty string to erase",
        ),
        Option(prefix + "iter-time", NUM, None, "Time to spend in PBKDF in milliseconds"),
    )


def scheme(values: Values, prefix: str = "") -> Scheme:
    """How the volume that `values` describe is encrypted. Raises OptionError for names without a meaning."""
    from qimg.crypto import names
    from qimg.crypto.luks import Scheme

    def choice(name: str, known: list[str] | tuple[str, ...]) -> str | None:
        value = values.get(prefix + name)
        if value is not None and value not in known:
            raise OptionError(f"Parameter '{name}' does not accept value '{value}'", option=prefix + name)
        return None if value is None else str(value)

    hashes = list(names.HASHES)
    cipher, mode = choice("cipher-alg", names.creatable()), choice("cipher-mode", names.MODES)
    ivgen, ivgen_hash = choice("ivgen-alg", names.IV_GENERATORS), choice("ivgen-hash-alg", hashes)
    hash = choice("hash-alg", hashes)
    return Scheme(cipher or "aes-256", mode or "xts", ivgen or "plain64", ivgen_hash, hash or "sha256")


def iter_time(values: Values, prefix: str = "") -> int:
    """Milliseconds that unlocking is to take."""
    return int(values.get(prefix + "iter-time", ITER_TIME))


def require(values: Values, prefix: str = "") -> str:
    """The id of the secret with the passphrase. Raises OptionError where the options name none."""
    name = prefix + KEY_SECRET
    if name not in values:
        raise OptionError(f"Parameter '{name}' is required for cipher", option=name)
    return str(values[name])


def passphrase(values: Values, context: Context, prefix: str = "") -> bytes:
    """The passphrase that the options name. Raises OptionError."""
    return context.secret(require(values, prefix))


class SlotChange:
    """An `amend` of key slots."""

    def __init__(
        self,
        header: LuksHeader,
        area: Storage,
        values: Values,
        *,
        unlock: Callable[[], bytearray],
        context: Context,
        force: bool,
        prefix: str = "",
    ) -> None:
        """`unlock` gives the master key, which is wiped after use; `force` allows to lock everybody out."""
        self._header = header
        self._area = area
        self._values = {name.removeprefix(prefix): value for name, value in values.items()}
        self._unlock = unlock
        self._context = context
        self._force = force

    def run(self) -> None:
        """Change the slots; durable when it returns. Raises OptionError, QimgError, StorageError."""
        state = self._values.get("state")
        if state is None:
            raise OptionError("Parameter 'state' is missing", option="state")
        if state not in ("active", "inactive"):
            raise OptionError(f"Parameter 'state' does not accept value '{state}'", option="state")
        if state == "active":
            self._add()
        else:
            self._erase()

    def _slot(self) -> int | None:
        """The slot that the user names. Raises OptionError."""
        from qimg.crypto.luks import SLOTS

        if "keyslot" not in self._values:
            return None
        number = int(self._values["keyslot"])
        if not 0 <= number < SLOTS:
            shown = number & 0xFFFFFFFF if self._values["state"] == "active" else number
            raise OptionError(
                f"Invalid keyslot {shown} specified, must be between 0 and {SLOTS - 1}", option="keyslot"
            )
        return number

    def _must_not(self, name: str, when: str) -> None:
        if name in self._values:
            raise OptionError(f"'{name}' must not be given when {when} keyslots", option=name)

    # -- adding

    def _add(self) -> None:
        from qimg.crypto.kdf import wipe

        if "new-secret" not in self._values:
            raise OptionError("'new-secret' is required to activate a keyslot", option="new-secret")
        self._must_not("old-secret", "activating")
        number = self._target()
        key = self._unlock()
        try:
            new = self._context.secret(str(self._values["new-secret"]))
            self._header.add_slot(self._area, number, key, new, iter_time(self._values))
        finally:
            wipe(key)

    def _target(self) -> int:
        """The slot to fill. Raises OptionError, QimgError."""
        active = self._header.active_slots()
        number = self._slot()
        if number is None:
            free = [slot for slot in range(len(self._header.slots)) if slot not in active]
            if not free:
                raise QimgError("Can't add a keyslot - all keyslots are in use")
            return free[0]
        if number in active and not self._force:
            raise QimgError(f"Refusing to overwrite active keyslot {number} - please erase it first")
        return number

    # -- erasing

    def _erase(self) -> None:
        self._must_not("new-secret", "erasing")
        self._must_not("iter-time", "erasing")
        old = self._values.get("old-secret")
        word = None if old is None else self._context.secret(str(old))
        number = self._slot()
        if number is not None:
            self._erase_one(number, word)
        elif word is not None:
            self._erase_matching(word)
        else:
            raise OptionError(
                "To erase keyslot(s), either explicit keyslot index or the password currently contained in"
                " them must be given"
            )

    def _erase_one(self, number: int, word: bytes | None) -> None:
        active = self._header.active_slots()
        if word is not None and not self._opens(number, word):
            raise QimgError(
                f"Given keyslot {number} doesn't contain the given old password for erase operation"
            )
        if not self._force and number not in active:
            raise QimgError(f"Given keyslot {number} is already erased (inactive) ")
        if not self._force and active == [number]:
            raise QimgError(
                f"Attempt to erase the only active keyslot {number} which will erase all the data in the"
                " image irreversibly - refusing operation"
            )
        self._header.erase_slot(self._area, number)

    def _erase_matching(self, word: bytes) -> None:
        active = self._header.active_slots()
        matching = [number for number in active if self._opens(number, word)]
        if not matching:
            raise QimgError("No keyslots match given (old) password for erase operation")
        if matching == active and not self._force:
            raise QimgError(
                "All the active keyslots match the (old) password that was given and erasing them will erase"
                " all the data in the image irreversibly - refusing operation"
            )
        for number in matching:
            self._header.erase_slot(self._area, number)

    def _opens(self, number: int, word: bytes) -> bool:
        from qimg.crypto.kdf import wipe

        key = self._header.open_slot(self._area, number, word)
        if key is None:
            return False
        wipe(key)
        return True
