"""The known differences of release 7.2 (the real program at hand) from the 10.0 layout that qimg prints.

Each function takes OUR output and gives what 7.2 prints for it, so that tests compare as text and nothing is
hidden but what stands here. What is changed, and no more:

================== ==================================================================================
info, human        no ``Child node '...':`` blocks (they came in 8.0); the older snapshot table
info, JSON         no ``children`` member
info of luks       no ``detached header`` (it came in 9.0)
map, JSON          no ``compressed`` member
snapshot -l        ID ten columns wide, ``VM SIZE``, clock ``HH:MM:SS.mmm``, unknown ICOUNT empty
errors             `ERRORS` below: pairs of wordings
================== ==================================================================================

A difference that is OURS by intent (qimg refuses to lose data, say) does not belong here: the test names it
and ``docs/differences.md`` lists it.
"""

from __future__ import annotations

import json
import re

#: (what 10.0 and qimg say, what 7.2 says); regular expressions, applied to whole standard error.
ERRORS: tuple[tuple[str, str], ...] = (
    (
        r"does not support creating new images, .*? as an existing image failed: ",
        r"does not support image creation, and opening the image failed: ",
    ),
    (
        r"Value '-\d+' is out of range for parameter '(.*)'",
        (
            r"Parameter '\1' expects a non-negative number below 2^64\n"
            r"Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
            r"and exabytes, respectively."
        ),
    ),
    (
        r"Could not create snapshot '(.*)': Operation not supported",
        r"Could not create snapshot '\1': -95 (Operation not supported)",
    ),
)

_CHILD = re.compile(r"(?m)^( *)Child node '[^\n]*':\n(?:\1    [^\n]*\n)*")
_DETACHED = re.compile(r"(?m)^ *detached header: false\n")
_JSON_DETACHED = re.compile(r'(?m)^ *"detached-header": false,\n')
_JSON_CHILDREN = re.compile(r'(?ms)^( *)"children": \[\n.*?^\1\],\n')
_COMPRESSED = re.compile(r', "compressed": (?:true|false)')
_TABLE_HEAD = "ID      TAG               VM_SIZE                DATE        VM_CLOCK     ICOUNT"
_TABLE_HEAD_7 = "ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT"
_TABLE_ROW = re.compile(
    r"(?P<id>.{7,}?) (?P<tag>.{16,}?) +(?P<size>\S+ \S?i?B) (?P<date>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) +"
    r"(?P<hours>\d+):(?P<clock>\d\d:\d\d\.\d{3}) +(?P<icount>\d+|--)"
)


def info_human(text: str) -> str:
    """Our ``info`` as 7.2 prints it."""
    return snapshot_table(_DETACHED.sub("", _CHILD.sub("", text)))


def info_json(text: str) -> str:
    """Our ``info --output=json`` as 7.2 prints it. Text in, text out: order and layout stay ours.

    Only the children of images go; a ``children`` member below one (grandchildren) goes with it.
    """
    return _JSON_DETACHED.sub("", _JSON_CHILDREN.sub("", text))


def map_json(text: str) -> str:
    """Our ``map --output=json`` as 7.2 prints it."""
    return _COMPRESSED.sub("", text)


def snapshot_table(text: str) -> str:
    """Our snapshot tables (``snapshot -l``, ``info``) as 7.2 prints them."""
    lines = text.split("\n")
    inside = False
    for number, line in enumerate(lines):
        if line == _TABLE_HEAD:
            lines[number] = _TABLE_HEAD_7
            inside = True
        elif inside:
            row = _TABLE_ROW.fullmatch(line)
            inside = row is not None
            if row is not None:
                lines[number] = _row_7(row)
    return "\n".join(lines)


def _row_7(row: re.Match[str]) -> str:
    name, tag = row["id"].rstrip(" "), row["tag"].rstrip(" ")
    clock = f"{int(row['hours']):02d}:{row['clock']}"
    icount = "" if row["icount"] == "--" else row["icount"]
    return f"{name:<9} {tag:<16} {row['size']:>8}{row['date']:>20}{clock:>13}{icount:>11}"


def errors(text: str) -> str:
    """Our messages in 7.2's words."""
    for ours, theirs in ERRORS:
        text = re.sub(ours, theirs, text)
    return text


def parsed_map(text: str) -> list[dict[str, object]]:
    """Either program's ``map --output=json`` as values, without ``compressed``."""
    rows: list[dict[str, object]] = json.loads(text)
    for row in rows:
        row.pop("compressed", None)
    return rows
