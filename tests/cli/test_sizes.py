"""Size arguments: both forms of refusal (common sheet, section 4a), option lists (section 6)."""

from __future__ import annotations

import pytest

from qimg.cli.common import CommandError, OptionList, size_argument

FIRST_FORM = (
    "Invalid offset specified. You may use k, M, G, T, P or E suffixes for",
    "kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.",
)
SECOND_FORM = ("Invalid offset specified. Must be between 0 and 9223372036854775807.",)


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("1k", 1024), ("010", 10), (" +0x10", 16), ("7E", 7 << 60), (".5k", 512)]
)
def test_a_size_is_read(text: str, size: int) -> None:
    assert size_argument("offset", text) == size


@pytest.mark.parametrize("text", ["", "x", "1.5", "1KiB", "0x10k", "-1k", "-1.5M", "1 ", "--1", "-"])
def test_what_is_no_size_gets_the_first_form(text: str) -> None:
    with pytest.raises(CommandError) as caught:
        size_argument("offset", text)
    assert caught.value.lines == FIRST_FORM


@pytest.mark.parametrize("text", ["-1", "8E", "9223372036854775808", "18446744073709551616", "1" + "0" * 99])
def test_what_is_too_large_or_negative_gets_the_second_form(text: str) -> None:
    """Release 7 answers ``-1`` with the first form; 10, whose words we use, with the second."""
    with pytest.raises(CommandError) as caught:
        size_argument("offset", text)
    assert caught.value.lines == SECOND_FORM


@pytest.mark.parametrize("text", ["", ",", ",a=1", "a=1,", "a=1,,,", ",,a"])
def test_an_option_list_does_not_start_or_end_with_a_separator(text: str) -> None:
    with pytest.raises(CommandError) as caught:
        OptionList().add(text)
    assert caught.value.lines == (f"Invalid option list: {text}",)


@pytest.mark.parametrize(
    ("texts", "pairs"),
    [
        (["a=1"], [("a", "1")]),
        (["a=1,b=2", "c=3"], [("a", "1"), ("b", "2"), ("c", "3")]),
        (["a=4k,,"], [("a", "4k,")]),
        (["a=x,,y,b"], [("a", "x,y"), ("b", "on")]),
        (["lazy_refcounts"], [("lazy_refcounts", "on")]),
        (["nolazy_refcounts"], [("lazy_refcounts", "off")]),
        (["nocow"], [("cow", "off")]),
        (["a,,b=1"], [("a", "on"), ("", "on"), ("b", "1")]),
        (["a=b=c"], [("a", "b=c")]),
        (["=5"], [("", "5")]),
    ],
)
def test_option_lists_are_joined_and_split(texts: list[str], pairs: list[tuple[str, str]]) -> None:
    options = OptionList()
    for text in texts:
        options.add(text)
    assert options.pairs() == pairs


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("help", True),
        ("?", True),
        ("bogus,help", True),
        ("a=1,?,b", True),
        ("lazy_refcounts,,help", True),
        ("help,,", True),
        ("help=1", False),
        ("helpx", False),
        ("backing_file=a,,help", False),
        ("nohelp", False),
    ],
)
def test_help_is_an_element_of_its_own(text: str, wanted: bool) -> None:
    options = OptionList()
    options.add("size=1")
    options.add(text)
    assert options.wants_help is wanted
