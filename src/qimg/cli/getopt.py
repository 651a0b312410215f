"""GNU getopt_long as qemu-img's users know it (common sheet, section 2).

Options and operands mix in any order, short options cluster and glue their values, long options may be
shortened as long as they stay unique. The standard library's parsers do none of this with these words.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class UsageError(Exception):
    """An option that does not exist or lacks its value.

    `word` is what qemu-img names: the word before its parser's index, which is not always the wrong one.
    `missing`: a value is missing. `plain` is getopt's own sentence (`measure` prints it).
    """

    def __init__(self, word: str, plain: str, *, missing: bool = False) -> None:
        super().__init__(plain)
        self.word = word
        self.plain = plain
        self.missing = missing


class Getopt:
    """Iterate for ``(key, value)`` pairs; afterwards `operands` holds the other words in order.

    short     ``"f:hU"``: a colon after a letter means that it takes a value.
    long      name -> key; a name ending in ``=`` takes a value. Its order shows in messages.
    before    the word that stands before `words` (program or command), needed for messages.
    stop      end at the first operand; so does POSIXLY_CORRECT in the environment.

    The key of a short option is its letter; `value` is "" for an option without one. Iterating raises
    UsageError.
    """

    def __init__(
        self,
        words: Sequence[str],
        short: str,
        long: dict[str, str],
        *,
        before: str,
        stop: bool = False,
    ) -> None:
        self.operands: list[str] = []
        self._words = words
        self._long = long
        self._before = before
        self._stop = stop or "POSIXLY_CORRECT" in os.environ
        self._next = 0
        self._takes_value = {
            letter: short[at + 1 : at + 2] == ":" for at, letter in enumerate(short) if letter != ":"
        }

    def __iter__(self) -> Iterator[tuple[str, str]]:
        words = self._words
        while self._next < len(words):
            word = words[self._next]
            self._next += 1
            if word == "--":
                break
            if word == "-" or not word.startswith("-"):
                self.operands.append(word)
                if self._stop:
                    break
            elif word.startswith("--"):
                yield self._long_option(word)
            else:
                yield from self._cluster(word)
        self.operands.extend(words[self._next :])
        self._next = len(words)

    def _cluster(self, word: str) -> Iterator[tuple[str, str]]:
        """``-pqfraw``: -p, -q and -f with the value raw."""
        previous = self._previous()
        for at, letter in enumerate(word[1:], start=2):
            if letter not in self._takes_value:
                # Inside a cluster the index has not moved yet. A non-ASCII letter is several bytes,
                # the first of which is never the last of the cluster.
                last = at == len(word) and letter.isascii()
                raise UsageError(word if last else previous, f"invalid option -- '{letter}'")
            if not self._takes_value[letter]:
                yield letter, ""
                continue
            value = word[at:] or self._take_value()
            if value is None:
                raise UsageError(word, f"option requires an argument -- '{letter}'", missing=True)
            yield letter, value
            return

    def _previous(self) -> str:
        """The word before the one just taken; getopt has moved the operands so far behind the options."""
        if self.operands:
            return self.operands[-1]
        return self._words[self._next - 2] if self._next >= 2 else self._before

    def _take_value(self) -> str | None:
        if self._next >= len(self._words):
            return None
        self._next += 1
        return self._words[self._next - 1]

    def _long_option(self, word: str) -> tuple[str, str]:
        typed, equals, glued = word[2:].partition("=")
        name = self._complete(word, typed)
        shown = name.rstrip("=")
        key = self._long[name]
        if not name.endswith("="):
            if equals:
                raise UsageError(word, f"option '--{shown}' doesn't allow an argument")
            return key, ""
        value = glued if equals else self._take_value()
        if value is None:
            raise UsageError(word, f"option '--{shown}' requires an argument", missing=True)
        return key, value

    def _complete(self, word: str, typed: str) -> str:
        """The name in the table that `typed` spells or uniquely begins."""
        for name in (typed, typed + "="):
            if typed and name in self._long:
                return name
        candidates = [name for name in self._long if name.startswith(typed)]
        if len(candidates) == 1:
            return candidates[0]
        if not candidates:
            raise UsageError(word, f"unrecognized option '{word}'")
        listed = " ".join(f"'--{name.rstrip('=')}'" for name in candidates)
        raise UsageError(word, f"option '{word}' is ambiguous; possibilities: {listed}")
