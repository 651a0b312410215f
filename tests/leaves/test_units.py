"""Sizes mean what qemu-img's manual and its sheet (4a, 4c) say."""

from __future__ import annotations

import pytest

from qimg.units import human_size, parse_size


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("010", 10),
        ("+1k", 1024),
        (" 1", 1),
        ("1b", 1),
        ("2.0b", 2),
        ("0.", 0),
        (".5M", 524288),
        ("1e", 1 << 60),
        ("0x1e", 30),
        ("0.1k", 102),
        ("1.0005k", 1025),
        ("1.0000001M", 1048576),
        ("0.9999999999999999999k", 1024),
        ("1G", 1 << 30),
        ("1t", 1 << 40),
        ("3P", 3 << 50),
        ("-1", -1),
    ],
)
def test_a_size_is_read_as_the_sheet_says(text: str, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "k",
        "1.5",
        "1.5b",
        "1KiB",
        "1kB",
        "1MM",
        "1,000",
        "1_000",
        "inf",
        "nan",
        "1e3",
        "0x",
        "0x10k",
        "1 ",
        "--1",
        "+-1",
        ".",
        ".k",
        "1..5k",
        "٣",
        "-1k",
        "-1.5k",
    ],
)
def test_text_that_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1023488, "1e+03 KiB"),
        (1048576, "1 MiB"),
        (5 << 30, "5 GiB"),
        (115 << 30, "115 GiB"),
        (9005000231485644800, "7.81 EiB"),
    ],
)
def test_sizes_are_shown_with_three_digits_and_the_unit_changes_at_1000(value: int, text: str) -> None:
    assert human_size(value) == text
