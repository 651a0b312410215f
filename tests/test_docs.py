"""The documents say what is so: their examples run, their links lead somewhere."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_every_example_of_the_library_page_runs(work: Path):
    text = (ROOT / "docs" / "library.md").read_text()
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```$", text)
    examples = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, "library.md", None, None)
    assert len(examples.examples) > 20
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    output: list[str] = []
    results = runner.run(examples, out=output.append)
    assert results.failed == 0, "".join(output)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_the_documents_lead_somewhere(page: Path):
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.name != "CHANGELOG.md"],  # a history names files that are gone
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_files_that_a_document_names_exist(page: Path):
    pattern = r"`((?:src|tests|docs|benchmarks|tools|bin)/[\w./-]+)`"
    for named in re.findall(pattern, page.read_text()):
        assert (ROOT / named).exists(), named


def test_the_numbers_of_the_differences_run_from_one():
    text = (ROOT / "docs" / "differences.md").read_text()
    numbers = [int(number) for number in re.findall(r"(?m)^\| (\d+) \|", text)]
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    assert numbers
