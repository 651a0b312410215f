"""One command line through both programs in folders of the same content; all that they leave is compared.

`Inputs` holds the files that a table's lines name. Each line gets them fresh: linked (and looked after: a
file that changed fails the test), or copied where the name starts with ``t-``, a target. What the two
programs leave is compared by the real program: content, structure, allocation (`image_differences`).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from support import peers, release7
from support.disks import states
from support.run import Both, run_both, run_real

#: What our file may take more than the real program's: the two place their tables differently, and a raw
#: file may need one more block for the file system's own list of its pieces.
SPACE_SLACK = 64 << 10
RAW_SLACK = 4096

Row = tuple[int, int, bool, bool, bool, int]  # start, end, present, zero, data, depth


#: What may be said of the files that are left where ours differs: all of `folder_differences` holds, only the
#: guest's bytes are the same (and ours is sound), or there is nothing to compare.
SAME, CONTENT, NOTHING = "same", "content", "nothing"


class Different(NamedTuple):
    """How ours differs on purpose. `row` is the number in docs/differences.md, 0: "Not there yet".

    `code`, `err`, `out`: ours; None: as the real program's. `files`: SAME, CONTENT or NOTHING."""

    row: int
    reason: str
    code: int | None = None
    err: str | None = None
    out: str | None = None
    files: str = NOTHING


def lines(table: str) -> list[str]:
    """The invocations of a table; empty lines and remarks (``##``) are left out."""
    return [line for line in table.splitlines() if line and not line.startswith("##")]


class Inputs:
    """The files in `folder`, handed out in a pair of folders in `scratch`."""

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.folder = folder
        self._pair = scratch / "real", scratch / "ours"
        for place in self._pair:
            place.mkdir()
        self._states: dict[str, tuple[int, int]] = {}

    def pair(self, words: Iterable[str]) -> tuple[Path, Path]:
        """The two folders, as new; of the targets (``t-``) they have those that `words` name."""
        named = " ".join(words)
        for place in self._pair:
            self._renew(place, named)
        self._states = states(self.folder)
        return self._pair

    def _renew(self, place: Path, named: str) -> None:
        """Give `place` the inputs again and take everything else away: hundreds of lines need few links."""
        inputs = {entry.name: entry for entry in os.scandir(self.folder)}
        there = set()
        for entry in os.scandir(place):
            wanted = inputs.get(entry.name)
            if wanted is not None and wanted.inode() == entry.inode():
                there.add(entry.name)
            elif entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)
        for name in inputs.keys() - there:
            if inputs[name].is_dir():
                shutil.copytree(inputs[name].path, place / name, copy_function=os.link)
            elif not name.startswith("t-"):
                os.link(inputs[name].path, place / name)
            elif name in named:
                copy_sparse(Path(inputs[name].path), place / name)

    def changed(self) -> list[str]:
        """Inputs that a program changed although they were not its to change."""
        now = states(self.folder)
        return [name for name, state in self._states.items() if now[name] != state]

    def lost(self, folder: Path) -> list[str]:
        """Targets in `folder`, of a command that failed, that are not what they were."""
        return [
            f"target {entry.name} was changed"
            for entry in os.scandir(folder)
            if entry.name.startswith("t-")
            and (self.folder / entry.name).read_bytes() != Path(entry.path).read_bytes()
        ]

    def names(self) -> set[str]:
        """Everything that a folder has before a program ran in it, but targets."""
        return {entry.name for entry in os.scandir(self.folder) if not entry.name.startswith("t-")}


def copy_sparse(source: Path, target: Path) -> None:
    """A copy whose holes are holes."""
    with source.open("rb") as old, target.open("wb") as new:
        size = os.fstat(old.fileno()).st_size
        new.truncate(size)
        for start, length in data_pieces(old.fileno()):
            os.pwrite(new.fileno(), os.pread(old.fileno(), length, start), start)


def data_pieces(file: int) -> Iterator[tuple[int, int]]:
    """(start, length) of what is not a hole in a file, given by its descriptor, at most 16 MiB each."""
    end = 0
    while True:
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
        except OSError:
            return  # a hole up to the end
        end = os.lseek(file, start, os.SEEK_HOLE)
        for at in range(start, end, 16 << 20):
            yield at, min(16 << 20, end - at)


# -- running a line


def compare_line(
    line: str,
    inputs: Inputs,
    different: dict[str, Different],
    *,
    format: str | None,
    replace: dict[str, str] | None = None,
) -> None:
    """Run one line of a table through both programs; AssertionError tells all the ways in which they differ.

    `format` is the format of what the line leaves; None: it leaves nothing to look at. `replace` has other
    words for words of the line (device names, say)."""
    words = [(replace or {}).get(word, word) for word in shlex.split(line)]
    real_dir, our_dir = inputs.pair(words)
    both = run_both(words, real_dir, our_dir)
    intended = different.get(line)
    problems = _answer_differences(both, intended)
    problems += [f"input {name} was changed" for name in inputs.changed()]
    if both.ours.code:
        problems += inputs.lost(our_dir)
    allowed = SAME if intended is None else intended.files
    if allowed != NOTHING:
        problems += folder_differences(both, inputs.names(), format, content_only=allowed == CONTENT)
    if (
        intended is not None
        and not problems
        and not (_answer_differences(both, None) or folder_differences(both, inputs.names(), format))
    ):
        problems.append("no difference any more: take it from the list")
    assert not problems, "\n".join([line, *problems])


def _answer_differences(both: Both, intended: Different | None) -> list[str]:
    problems = []
    code, out, err = both.real.code, both.real.out, both.real.err
    if intended is not None:
        code = code if intended.code is None else intended.code
        out = out if intended.out is None else intended.out
        err = err if intended.err is None else intended.err
    ours = both.ours
    our_err = ours.err if intended is not None and intended.err is not None else release7.errors(ours.err)
    if ours.code != code:
        problems.append(f"exit code {ours.code}, not {code}")
    if ours.out != out:
        problems.append(f"standard output\n  {ours.out!r}, not\n  {out!r}")
    if our_err != err:
        problems.append(f"standard error\n  {our_err!r}, not\n  {err!r}")
    return problems


def folder_differences(
    both: Both, inputs: set[str], format: str | None, *, content_only: bool = False
) -> list[str]:
    """What differs in the files that the two programs left; `content_only`: in what a guest reads of them."""
    made = [
        {entry.name for entry in os.scandir(folder) if entry.name not in inputs and not entry.is_dir()}
        for folder in (both.real_dir, both.our_dir)
    ]
    if made[0] != made[1]:
        return [f"files: {sorted(made[1])}, not {sorted(made[0])}"]
    if both.real.code != 0 or format is None:
        return []
    problems = []
    for name in sorted(made[0]):
        kind = "raw" if name.endswith(".data") else format
        if kind == "raw" and format != "raw" and content_only:
            continue  # part of an image
        found = image_differences(both.real_dir / name, both.our_dir / name, kind, content_only=content_only)
        problems += [f"{name}: {text}" for text in found]
    return problems


# -- images


def image_differences(real: Path, ours: Path, format: str, *, content_only: bool = False) -> list[str]:
    """How our image differs from the real program's, by the real program's judgement.

    The content must be the same, ours without errors or leaks, `info` the same but for the disk size, and
    `map` the same but for offsets, and but for holes that ours has inside of data; ours must not take more
    space."""
    common = Path(os.path.commonpath([real, ours]))
    asked = ["-f", format, "--output=json"]
    both = [str(path.relative_to(common)) for path in (real, ours)]
    commands: list[tuple[list[str], Path]] = [
        (["compare", "-f", format, "-F", format, *both], common),
        (["info", *asked, f"./{real.name}"], real.parent),
        (["info", *asked, f"./{ours.name}"], ours.parent),
        (["map", *asked, f"./{real.name}"], real.parent),
        (["map", *asked, f"./{ours.name}"], ours.parent),
    ]
    if format == "qcow2":
        commands.append((["check", "-f", format, f"./{ours.name}"], ours.parent))
    if not content_only and _identical(real, ours):
        # What the real program would say of the two is the same; only how sound they are is left to ask.
        answers = _run_all(commands[5:])
        return [
            f"real check of ours: exit {code}: {output}"
            for code, output in answers
            if code and "Could not open backing file" not in output
        ]
    answers = _run_all(commands)
    if answers[3] == answers[4] and answers[3][0] and "Could not open backing file" in answers[3][1]:
        # Created without looking at the backing file (-u): the header is all that there is to compare.
        return _info_differences(json.loads(answers[1][1]), json.loads(answers[2][1]))
    problems = [
        f"real {words[0]} of ours: exit {code}: {output}"
        for (words, _), (code, output) in zip(commands, answers, strict=True)
        if code and not (words[0] == "compare" and "Could not open" in output)
    ]
    if answers[0][0] and not problems and _guest(real, format) != _guest(ours, format):
        problems.append("the guest's bytes differ")
    if problems or content_only:
        return problems
    problems += _info_differences(json.loads(answers[1][1]), json.loads(answers[2][1]))
    problems += map_differences(map_rows(answers[3][1]), map_rows(answers[4][1]))
    problems += _space_differences(real, ours, format)
    return problems


def _identical(first: Path, second: Path) -> bool:
    """Whether two files have the same bytes, the same holes and take the same space."""
    with first.open("rb") as one, second.open("rb") as other:
        states = [os.fstat(file.fileno()) for file in (one, other)]
        pieces = list(data_pieces(one.fileno()))
        return (
            states[0].st_size == states[1].st_size
            and states[0].st_blocks == states[1].st_blocks
            and pieces == list(data_pieces(other.fileno()))
            and all(
                os.pread(one.fileno(), length, start) == os.pread(other.fileno(), length, start)
                for start, length in pieces
            )
        )


def _run_all(commands: list[tuple[list[str], Path]]) -> list[tuple[int, str]]:
    """Run the real program with these words in these folders, all at once: exit codes and outputs."""
    program = peers.need("qemu-img")
    started = [
        subprocess.Popen(
            [program, *words],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for words, cwd in commands
    ]
    outputs = [process.communicate(timeout=60)[0] for process in started]
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]


def _guest(path: Path, format: str) -> bytes:
    """The guest's bytes, read in the image's own folder: for names that are relative to that."""
    target = path.with_name(path.name + ".guest")
    run_real(["convert", "-f", format, "-O", "raw", f"./{path.name}", target], path.parent).ok()
    data = target.read_bytes()
    target.unlink()
    return data


def _info_differences(real: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    for info in (real, ours):
        info.pop("actual-size", None)
    return [
        f"info: {key} is {ours.get(key)!r}, not {real.get(key)!r}"
        for key in sorted(real.keys() | ours.keys())
        if real.get(key) != ours.get(key)
    ]


def _space_differences(real: Path, ours: Path, format: str) -> list[str]:
    theirs, own = os.stat(real), os.stat(ours)
    problems = []
    slack = RAW_SLACK if format == "raw" else SPACE_SLACK
    if own.st_blocks * 512 > theirs.st_blocks * 512 + slack:
        problems.append(f"takes {own.st_blocks * 512} bytes of disk, not {theirs.st_blocks * 512}")
    if format == "raw" and own.st_size != theirs.st_size:
        problems.append(f"length {own.st_size}, not {theirs.st_size}")
    return problems


def map_rows(text: str) -> list[Row]:
    """`map --output=json` without offsets, neighbours of one kind joined."""
    rows: list[Row] = []
    for entry in json.loads(text):
        start, end = entry["start"], entry["start"] + entry["length"]
        kind = (entry["present"], entry["zero"], entry["data"], entry["depth"])
        if rows and rows[-1][2:] == kind:
            start = rows.pop()[0]
        rows.append((start, end, *kind))
    return rows


def map_differences(real: list[Row], ours: list[Row]) -> list[str]:
    """Where the two maps say different things. Data that ours knows to be zeros is no difference: it leaves
    holes in clusters that the real program fills up with zeros."""
    problems = []
    for start, end, theirs, own in _overlaid(real, ours):
        if theirs == own:
            continue
        if theirs[0] and theirs[2] and own == (True, True, *theirs[2:]):
            continue
        problems.append(f"map: {start}-{end} is {_told(own)}, not {_told(theirs)}")
    return problems


def _overlaid(
    real: list[Row], ours: list[Row]
) -> list[tuple[int, int, tuple[bool, bool, bool, int], tuple[bool, bool, bool, int]]]:
    borders = sorted({at for rows in (real, ours) for row in rows for at in row[:2]})
    both = []
    for start, end in pairwise(borders):
        kinds = []
        for rows in (real, ours):
            found = [row[2:] for row in rows if row[0] <= start and end <= row[1]]
            kinds.append(found[0] if found else (False, False, False, -1))
        both.append((start, end, kinds[0], kinds[1]))
    return both


def _told(kind: tuple[bool, bool, bool, int]) -> str:
    present, zero, data, depth = kind
    words = [name for name, said in (("present", present), ("zero", zero), ("data", data)) if said]
    return f"{'+'.join(words) or 'nothing'} at depth {depth}"
