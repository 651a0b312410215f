"""The option parser: GNU getopt_long's rules, and which word an error names (common sheet, section 2)."""

from __future__ import annotations

import pytest

from qimg.cli.getopt import Getopt, UsageError

SHORT = "hf:qU"
LONG = {"help": "h", "force-share": "U", "format=": "f", "output=": "output", "backing-chain": "chain"}


def parse(*words: str, stop: bool = False) -> tuple[list[tuple[str, str]], list[str]]:
    parser = Getopt(words, SHORT, LONG, before="info", stop=stop)
    found = list(parser)
    return found, parser.operands


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POSIXLY_CORRECT", raising=False)


def test_options_and_operands_mix_in_any_order() -> None:
    assert parse("a", "-q", "b", "-f", "raw", "c") == ([("q", ""), ("f", "raw")], ["a", "b", "c"])


def test_short_options_cluster_and_the_last_takes_the_rest_as_its_value() -> None:
    assert parse("-qUfraw") == ([("q", ""), ("U", ""), ("f", "raw")], [])


def test_an_equals_sign_after_a_short_option_belongs_to_the_value() -> None:
    assert parse("-f=raw") == ([("f", "=raw")], [])


def test_a_value_may_look_like_an_option() -> None:
    assert parse("-f", "--help", "--output", "-q") == ([("f", "--help"), ("output", "-q")], [])
    assert parse("-f", "--", "x") == ([("f", "--")], ["x"])


def test_two_dashes_end_the_options() -> None:
    assert parse("a", "--", "-q", "--") == ([], ["a", "-q", "--"])


def test_a_lone_dash_is_an_operand() -> None:
    assert parse("-", "-q") == ([("q", "")], ["-"])


def test_a_long_option_takes_its_value_after_an_equals_sign_or_as_the_next_word() -> None:
    assert parse("--output=json", "--output", "human", "--output=") == (
        [("output", "json"), ("output", "human"), ("output", "")],
        [],
    )


def test_a_long_option_may_be_shortened_while_it_is_unique() -> None:
    assert parse("--out", "json", "--b", "--forc") == ([("output", "json"), ("chain", ""), ("U", "")], [])
    assert parse("--form=raw") == ([("f", "raw")], [])


def test_an_exact_name_wins_over_longer_ones() -> None:
    parser = Getopt(["--force"], "", {"force-share": "U", "force": "force"}, before="amend")
    assert list(parser) == [("force", "")]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["-z"], "-z"),
        (["--zzz"], "--zzz"),
        (["--zzz=1"], "--zzz=1"),
        (["--f"], "--f"),  # --force-share or --format
        (["--force-share=1"], "--force-share=1"),
        (["-?"], "-?"),
        (["-Uz"], "-Uz"),
        (["x", "-Uz"], "-Uz"),
        (["-zU"], "info"),
        (["-zU", "x"], "info"),
        (["x", "-zf", "raw"], "x"),
        (["-f", "raw", "-zU"], "raw"),
        (["x", "-q", "-zU"], "x"),
        (["-q", "x", "y", "-zU"], "y"),
        (["-é"], "info"),
    ],
)
def test_an_unknown_option_names_the_word_before_the_parser(words: list[str], named: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(*words)
    assert (caught.value.word, caught.value.missing) == (named, False)


@pytest.mark.parametrize("words", [["-f"], ["x", "-f"], ["-qf"], ["--output"], ["--out"]])
def test_a_missing_value_names_the_option_as_typed(words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse(*words)
    assert (caught.value.word, caught.value.missing) == (words[-1], True)


def test_the_first_wrong_option_counts() -> None:
    with pytest.raises(UsageError) as caught:
        parse("-z", "-f")
    assert caught.value.word == "-z"


def test_options_before_a_wrong_one_are_seen() -> None:
    parser = Getopt(["-q", "-z"], SHORT, LONG, before="info")
    iterator = iter(parser)
    assert next(iterator) == ("q", "")
    with pytest.raises(UsageError):
        next(iterator)


def test_the_global_parser_stops_at_the_first_operand() -> None:
    assert parse("-q", "info", "-q", stop=True) == ([("q", "")], ["info", "-q"])


def test_posixly_correct_stops_there_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSIXLY_CORRECT", "")
    assert parse("-q", "a", "-q", "--", "b") == ([("q", "")], ["a", "-q", "--", "b"])
