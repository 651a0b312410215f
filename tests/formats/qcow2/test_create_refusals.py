"""What creating a qcow2 image refuses: the words, and which refusal comes first, are the real program's."""

from __future__ import annotations

import random
from itertools import combinations
from pathlib import Path

import pytest

from qimg.errors import LimitError, OptionError, QimgError
from qimg.formats.qcow2.create import validate_create
from qimg.formats.qcow2.create_options import CREATE_OPTIONS
from qimg.options import parse_values
from support.run import run_real

MIB = 1 << 20

#: Options that are wrong alone; keys may be joined with those of another row unless they contradict.
BAD = {
    "compat": {"compat": "foo"},
    "compat, empty": {"compat": ""},
    "compat, capital": {"compat": "V3"},
    "preallocation": {"preallocation": "foo"},
    "compression": {"compression_type": "lz4"},
    "cluster size not a power": {"cluster_size": "300"},
    "cluster size too small": {"cluster_size": "256"},
    "cluster size too large": {"cluster_size": "4M"},
    "cluster size zero": {"cluster_size": "0"},
    "subclusters too small": {"extended_l2": "on", "cluster_size": "4k", "compat": "1.1"},
    "subclusters in v2": {"extended_l2": "on", "compat": "v2"},
    "lazy in v2": {"lazy_refcounts": "on", "compat": "0.10"},
    "width": {"refcount_bits": "3"},
    "width zero": {"refcount_bits": "0"},
    "width too large": {"refcount_bits": "128"},
    "width in v2": {"refcount_bits": "8", "compat": "0.10"},
    "zstd in v2": {"compression_type": "zstd", "compat": "v2"},
    "raw without data file": {"data_file_raw": "on"},
    "data file in v2": {"data_file": "df", "compat": "v2"},
    "format without backing": {"backing_fmt": "raw"},
    "unknown backing format": {"backing_file": "b", "backing_fmt": "nosuch"},
    "preallocation over backing": {"backing_file": "b", "backing_fmt": "raw", "preallocation": "metadata"},
    "raw data file over backing": {
        "backing_file": "b",
        "backing_fmt": "raw",
        "data_file": "df",
        "data_file_raw": "on",
    },
    "too large": {"size": "3P"},
    "too large for small clusters": {"size": "129G", "cluster_size": "512"},
    "too large for subclusters": {"size": "1025T", "extended_l2": "on"},
    "negative": {"size": "8E"},
    "long backing name": {"backing_file": "b" * 1024, "backing_fmt": "raw"},
    "no room for the backing name": {
        "backing_file": "b" * 377,
        "backing_fmt": "raw",
        "cluster_size": "512",
        "compat": "1.1",
    },
    "key for nothing": {"encrypt.key-secret": "foo"},
    "unknown encryption": {"encrypt.format": "foo"},
    "encryption twice": {"encrypt.format": "aes", "encryption": "on"},
    "no key": {"encrypt.format": "luks"},
    "an option of the other encryption": {"encryption": "on", "encrypt.iter-time": "10"},
}


def ours(options: dict[str, str]) -> str:
    """The text of our refusal, or nothing."""
    values = parse_values(CREATE_OPTIONS, options.items())
    size = values.pop("size", MIB)
    assert isinstance(size, int)
    try:
        validate_create(size, values)
    except QimgError as error:
        return str(error)
    return ""


def real(options: dict[str, str], folder: Path) -> str:
    """The text of the real program's refusal, without its prefix."""
    text = ",".join(f"{name}={value}" for name, value in ({"size": "1M"} | options).items())
    result = run_real(["create", "-q", "-u", "-f", "qcow2", "-o", text, "x"], folder)
    return result.err.removeprefix("qemu-img: ").removeprefix("x: ").rstrip("\n")


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("name", BAD)
def test_one_wrong_option_is_refused_in_the_real_programs_words(name: str, tmp_path: Path) -> None:
    said = ours(BAD[name])
    assert said
    assert said == real(BAD[name], tmp_path)


def _pairs() -> list[tuple[str, str]]:
    """A third of all pairs that do not contradict each other: starting the real program takes the time."""
    pairs = [
        (first, second)
        for first, second in combinations(BAD, 2)
        if all(BAD[first][key] == BAD[second][key] for key in BAD[first].keys() & BAD[second].keys())
    ]
    return random.Random(0).sample(pairs, len(pairs) // 3)


@pytest.mark.peer("qemu-img")
def test_of_two_wrong_options_the_real_programs_choice_is_named(tmp_path: Path) -> None:
    different = []
    for first, second in _pairs():
        options = BAD[first] | BAD[second]
        if "encrypt.key-secret" in options and {"encryption", "encrypt.format"} & options.keys():
            continue  # with encryption the real program goes on to look for the secret
        wanted, got = real(options, tmp_path), ours(options)
        if wanted != got:
            different.append((first, second, wanted, got))
    assert different == []


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize(
    "options",
    [
        {"compat": "0.10"},
        {"compat": "v2"},
        {"compat": "v3", "refcount_bits": "1"},
        {"refcount_bits": "64", "cluster_size": "2M"},
        {"extended_l2": "on", "cluster_size": "16k"},
        {"size": "2P"},
        {"size": "128G", "cluster_size": "512"},
        {"size": "1024T", "extended_l2": "on"},
        {"data_file_raw": "off"},
        {"compat": "v2", "compression_type": "zlib", "lazy_refcounts": "off"},
        {"backing_file": "b" * 1023, "backing_fmt": "raw"},
        {"backing_file": "b" * 376, "backing_fmt": "raw", "cluster_size": "512"},
        {"backing_file": "b", "backing_fmt": "raw", "preallocation": "metadata", "extended_l2": "on"},
        {"backing_file": "b", "backing_fmt": "nbd"},
        {"backing_file": "b", "backing_fmt": "vvfat"},
    ],
    ids=str,
)
def test_what_the_real_program_accepts_is_accepted(options: dict[str, str], tmp_path: Path) -> None:
    assert real(options, tmp_path) == ""
    assert ours(options) == ""


def test_refusals_of_options_and_of_limits_are_told_apart() -> None:
    with pytest.raises(OptionError) as caught:
        validate_create(MIB, {"cluster_size": 300})
    assert caught.value.option == "cluster_size"
    with pytest.raises(LimitError):
        validate_create(3 << 50, {})


def test_the_options_stand_in_the_order_in_which_they_are_echoed() -> None:
    # create sheet, "Output"
    names = [option.name for option in CREATE_OPTIONS]
    assert names == [
        "encryption",
        "encrypt.format",
        "encrypt.key-secret",
        "encrypt.cipher-alg",
        "encrypt.cipher-mode",
        "encrypt.ivgen-alg",
        "encrypt.ivgen-hash-alg",
        "encrypt.hash-alg",
        "encrypt.iter-time",
        "cluster_size",
        "extended_l2",
        "preallocation",
        "compression_type",
        "size",
        "compat",
        "backing_file",
        "backing_fmt",
        "data_file",
        "data_file_raw",
        "lazy_refcounts",
        "refcount_bits",
    ]
    assert {option.name: option.default for option in CREATE_OPTIONS if option.default is not None} == {
        "cluster_size": 65536,
        "extended_l2": False,
        "compression_type": "zlib",
        "lazy_refcounts": False,
        "refcount_bits": 16,
    }
