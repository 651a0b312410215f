"""Each command: from its words to one call of its job, and from the job's answer to output and exit code.

The jobs are stand-ins here; what they do has tests of its own.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from qimg.context import Notice
from qimg.errors import NotSupported, OpenError, OptionError, QimgError
from qimg.formats.base import CheckResult, Measure
from qimg.jobs import check as check_job
from qimg.jobs import compare as compare_job
from qimg.jobs import convert as convert_job
from qimg.jobs import create as create_job
from qimg.jobs import info as info_job
from qimg.jobs import map as map_job
from qimg.jobs import measure as measure_job
from qimg.jobs.map import MapEntry
from qimg.options import SIZE, STR, Option
from support.run import Result, run_qimg_inprocess


class Job:
    """A stand-in for a job's function: notes its arguments, then answers or raises."""

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        answer = self.answer(*args, **kwargs) if callable(self.answer) else self.answer
        if isinstance(answer, BaseException):
            raise answer
        return answer

    @property
    def args(self) -> tuple[Any, ...]:
        (call,) = self.calls
        return call[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        (call,) = self.calls
        return call[1]


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Any:
    def replace(module: ModuleType, name: str, answer: Any = None) -> Job:
        job = Job(answer)
        monkeypatch.setattr(module, name, job)
        return job

    return replace


def run(*words: str, prog: str = "qimg") -> Result:
    return run_qimg_inprocess(words, prog=prog)


class Plan:
    name, format = "n", "qcow2"
    shown = (("size", "1048576"), ("backing_file", "a,,b"))


class TestCreate:
    def test_every_option_reaches_the_job(self, replace: Any) -> None:
        plan = replace(create_job, "plan_create", Plan())
        made = replace(create_job, "run_create")
        words = "create -f qcow2 -b base -F raw -u -o a=1,b -o noc,d=x,,y --object secret,id=s,data=x n 1.5k"
        result = run(*words.split())
        assert plan.args == ("n",)
        context = plan.kwargs.pop("context")
        assert plan.kwargs == {
            "format": "qcow2",
            "size": 1536,
            "options": [("a", "1"), ("b", "on"), ("c", "off"), ("d", "x,y")],
            "backing": "base",
            "backing_format": "raw",
            "unsafe": True,
        }
        assert context.objects["s"].data == b"x"
        assert len(made.calls) == 1
        assert result == (0, "Formatting 'n', fmt=qcow2 size=1048576 backing_file=a,,b\n", "")

    def test_defaults(self, replace: Any) -> None:
        plan = replace(create_job, "plan_create", Plan())
        replace(create_job, "run_create")
        assert run("create", "-q", "n") == (0, "", "")
        assert plan.kwargs["format"] == "raw"
        assert plan.kwargs["size"] is None
        assert plan.kwargs["options"] == []
        assert plan.kwargs["backing"] is None

    def test_vhd_is_another_word_for_vpc(self, replace: Any) -> None:
        plan = replace(create_job, "plan_create", Plan())
        replace(create_job, "run_create")
        run("create", "-f", "vhd", "-b", "x", "-F", "vhd", "n", "1M")
        assert (plan.kwargs["format"], plan.kwargs["backing_format"]) == ("vpc", "vpc")

    def test_a_refusal_names_the_file_and_prints_no_line(self, replace: Any) -> None:
        replace(create_job, "plan_create", OptionError("Invalid parameter 'x'", hint="second line"))
        assert run("create", "n", "1M") == (1, "", "qimg: n: Invalid parameter 'x'\nsecond line\n")

    def test_a_driver_failure_comes_after_the_line(self, replace: Any) -> None:
        replace(create_job, "plan_create", Plan())
        replace(create_job, "run_create", QimgError("Could not resize file: No space left on device"))
        result = run("create", "n", "1M")
        assert result.out.startswith("Formatting 'n'")
        assert result.err == "qimg: n: Could not resize file: No space left on device\n"
        assert result.code == 1

    @pytest.mark.parametrize("options", [["-o", "help"], ["-o", "?"], ["-o", "bogus,help", "-o", "size=x"]])
    @pytest.mark.parametrize(("operands", "name"), [([], None), (["n"], "n"), (["n", "x", "y"], "n")])
    def test_help_wins_over_everything_else(
        self, replace: Any, options: list[str], operands: list[str], name: str | None
    ) -> None:
        table = (Option("size", SIZE, None, "how large"), Option("preallocation", STR, None, "what"))
        asked = replace(create_job, "creation_options", table)
        result = run("create", "-f", "qcow2", *options, *operands)
        assert asked.args == ("qcow2", name)
        assert result.lines[0] == ("Supported options:" if name else "Supported qcow2 options:")
        assert (result.code, result.err) == (0, "")

    @pytest.mark.parametrize("options", ["help=1", "helpx", "a=b,,help", "?x"])
    def test_what_only_looks_like_help_is_an_option(self, replace: Any, options: str) -> None:
        plan = replace(create_job, "plan_create", Plan())
        replace(create_job, "run_create")
        run("create", "-o", options, "n", "1M")
        assert len(plan.calls) == 1


def image(name: str) -> info_job.ImageInfo:
    return info_job.ImageInfo(name, "raw", 512)


BLOCK = "image: {}\nfile format: raw\nvirtual size: 512 B (512 bytes)\ndisk size: unavailable\n"


class TestInfo:
    def test_every_option_reaches_the_job(self, replace: Any) -> None:
        job = replace(info_job, "info", [image("a")])
        assert run("info", "-f", "raw", "--backing-chain", "-U", "a").code == 0
        spec = job.args[0]
        assert (spec.text, spec.format, spec.image_opts, spec.force_share) == ("a", "raw", False, True)
        assert job.kwargs["backing_chain"] is True

    def test_the_members_of_a_chain_are_separated_by_an_empty_line(self, replace: Any) -> None:
        replace(info_job, "info", [image("a"), image("b")])
        result = run("info", "--backing-chain", "a")
        assert result == (0, BLOCK.format("a") + "\n" + BLOCK.format("b"), "")

    def test_json_is_an_object_and_with_the_chain_an_array(self, replace: Any) -> None:
        replace(info_job, "info", [image("a")])
        assert run("info", "--output=json", "a").out.startswith('{\n    "children": [\n    ],\n')
        assert run("info", "--output=json", "--backing-chain", "a").out.startswith("[\n    {\n")

    def test_several_files_are_separated_by_an_empty_line(self, replace: Any) -> None:
        replace(info_job, "info", lambda spec, **_: [image(spec.text)])
        assert run("info", "a", "b") == (0, BLOCK.format("a") + "\n" + BLOCK.format("b"), "")

    def test_one_bad_file_does_not_stop_the_rest(self, replace: Any) -> None:
        def answer(spec: Any, **_: Any) -> Any:
            return OpenError("bad", "No such file") if spec.text == "bad" else [image(spec.text)]

        replace(info_job, "info", answer)
        assert run("info", "bad", "a").out == BLOCK.format("a")
        result = run("info", "bad", "a", "bad", "b")
        assert result.out == BLOCK.format("a") + "\n" + BLOCK.format("b")
        assert result.err == "qimg: Could not open 'bad': No such file\n" * 2
        assert result.code == 1

    def test_not_even_one_that_is_too_much_for_us(self, replace: Any) -> None:
        def answer(spec: Any, **_: Any) -> Any:
            return MemoryError() if spec.text == "bad" else [image(spec.text)]

        replace(info_job, "info", answer)
        assert run("info", "bad", "a") == (1, BLOCK.format("a"), "qimg: Cannot allocate memory\n")

    def test_several_files_make_one_json_array_without_the_bad_ones(self, replace: Any) -> None:
        import json

        def answer(spec: Any, **_: Any) -> Any:
            return OpenError("bad", "x") if spec.text == "bad" else [image(spec.text)]

        replace(info_job, "info", answer)
        result = run("info", "--output=json", "a", "bad", "b")
        assert [one["filename"] for one in json.loads(result.out)] == ["a", "b"]
        assert json.loads(run("info", "--output=json", "bad", "bad").out) == []
        assert result.code == 1

    def test_a_single_bad_file_prints_nothing_on_stdout(self, replace: Any) -> None:
        replace(info_job, "info", OpenError("bad", "x", hint="Is another process using the image [bad]?"))
        assert run("info", "--output=json", "bad") == (
            1,
            "",
            "qimg: Could not open 'bad': x\nIs another process using the image [bad]?\n",
        )


def outcome(**changes: int) -> check_job.CheckOutcome:
    result = CheckResult()
    for name, value in changes.items():
        setattr(result, name, value)
    return check_job.CheckOutcome("opened name", "qcow2", result)


class TestCheck:
    @pytest.mark.parametrize(
        ("counters", "code"),
        [
            ({}, 0),
            ({"leaks": 1}, 3),
            ({"corruptions": 1}, 2),
            ({"corruptions": 1, "leaks": 1}, 2),
            ({"check_errors": 1, "corruptions": 1, "leaks": 1}, 1),
        ],
    )
    def test_the_exit_code_tells_the_worst(self, replace: Any, counters: dict[str, int], code: int) -> None:
        replace(check_job, "check", outcome(**counters))
        assert run("check", "a").code == code

    def test_internal_errors_print_the_summary_and_fail(self, replace: Any) -> None:
        replace(check_job, "check", outcome(check_errors=1))
        result = run("check", "a")
        assert "1 internal errors" in result.out
        assert result.err == "qimg: Check failed\n"

    def test_findings_go_to_stderr_without_prefix_even_when_quiet(self, replace: Any) -> None:
        def answer(_: Any, report: Any, **__: Any) -> Any:
            report("Leaked cluster 9 refcount=1 reference=0")
            return outcome(leaks=1)

        replace(check_job, "check", answer)
        assert run("check", "-q", "a") == (3, "", "Leaked cluster 9 refcount=1 reference=0\n")
        assert run("check", "-q", "--output=json", "a").out == ""

    def test_a_format_without_check_ends_with_63(self, replace: Any) -> None:
        replace(check_job, "check", NotSupported("This image format does not support checks"))
        expected = (63, "", "qimg: This image format does not support checks\n")
        assert run("check", "a") == expected
        assert run("check", "--output=json", "a") == expected

    def test_a_check_that_cannot_finish_prints_no_summary(self, replace: Any) -> None:
        replace(check_job, "check", check_job.CheckFailed("Check failed: Input/output error"))
        assert run("check", "--output=json", "a") == (1, "", "qimg: Check failed: Input/output error\n")

    def test_json_names_the_file_as_typed(self, replace: Any) -> None:
        replace(check_job, "check", outcome())
        assert '"filename": "./a"' in run("check", "--output=json", "./a").out

    def test_every_option_reaches_the_job(self, replace: Any) -> None:
        job = replace(check_job, "check", outcome())
        run("check", "--format=qcow2", "-T", "none", "-U", "a")
        spec = job.args[0]
        assert (spec.text, spec.format, spec.cache, spec.force_share) == ("a", "qcow2", "none", True)

    @pytest.mark.parametrize("fix", ["leaks", "all"])
    def test_the_kind_of_repair_reaches_the_job(self, replace: Any, fix: str) -> None:
        job = replace(check_job, "check", outcome())
        run("check", "-r", fix, "a")
        assert job.kwargs["fix"] == fix

    def test_several_files_end_with_the_worst_code(self, replace: Any) -> None:
        answers = {"clean": outcome(), "leaky": outcome(leaks=1), "broken": outcome(corruptions=1)}
        replace(check_job, "check", lambda spec, **_: answers.get(spec.text) or NotSupported("no check"))
        assert run("check", "clean", "leaky").code == 3
        assert run("check", "broken", "leaky").code == 2
        assert run("check", "clean", "raw").code == 63
        result = run("check", "clean", "leaky")
        assert result.out.startswith("No errors were found on the image.\n\n\n1 leaked clusters")
        assert run("check", "--output=json", "clean", "raw", "leaky").out.startswith("[\n    {\n")


class TestCompare:
    def test_every_option_reaches_the_job(self, replace: Any) -> None:
        job = replace(compare_job, "compare", compare_job.Comparison("identical"))
        result = run("compare", "-f", "raw", "-F", "qcow2", "-s", "-T", "none", "-U", "a", "b")
        one, two = job.args
        assert (one.text, one.format, one.cache, one.force_share) == ("a", "raw", "none", True)
        assert (two.text, two.format, two.cache, two.force_share) == ("b", "qcow2", "none", True)
        assert job.kwargs["strict"] is True
        assert result == (0, "Images are identical.\n", "")

    @pytest.mark.parametrize("verdict", ["content", "size", "status"])
    def test_different_images_end_with_1(self, replace: Any, verdict: str) -> None:
        replace(compare_job, "compare", compare_job.Comparison(verdict, 512))
        assert run("compare", "a", "b").code == 1
        assert run("compare", "-q", "a", "b") == (1, "", "")

    def test_the_size_warning_is_a_line_of_output_before_the_verdict(self, replace: Any) -> None:
        def answer(*_: Any, warn_size: Any, **__: Any) -> Any:
            warn_size()
            return compare_job.Comparison("identical", sizes_differ=True)

        replace(compare_job, "compare", answer)
        assert run("compare", "a", "b").out == "Warning: Image size mismatch!\nImages are identical.\n"
        assert run("compare", "-q", "a", "b") == (0, "", "")

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (OpenError("a", "x"), 2),
            (compare_job.AllocationError("Sector allocation test failed for a"), 3),
            (compare_job.ReadError("Error while reading offset 0 of a: Input/output error"), 4),
            (MemoryError(), 2),
            (RecursionError(), 2),
            (ValueError("a bug"), 2),
            (OSError(5, "Input/output error"), 2),
        ],
    )
    def test_failures_have_their_own_codes(self, replace: Any, error: Exception, code: int) -> None:
        replace(compare_job, "compare", error)
        result = run("compare", "a", "b")
        assert (result.code, result.out) == (code, "")
        assert result.err.count("\n") == 1


ROWS = [
    MapEntry(0, 512, 0, True, True, False, False, None, None),
    MapEntry(512, 512, 0, True, False, True, False, 0x200, "a.q"),
    MapEntry(1024, 512, 0, True, True, True, False, 0x400, "a.q"),
    MapEntry(1536, 512, 1, True, False, True, False, 0, "b.q"),
]
HEADER = "Offset          Length          Mapped to       File\n"


class TestMap:
    def test_every_option_reaches_the_job(self, replace: Any) -> None:
        job = replace(map_job, "map_extents", lambda *_, **__: iter(ROWS))
        run("map", "-f", "raw", "-U", "--start-offset=1k", "--max-length", "2k", "a")
        assert (job.args[0].format, job.args[0].force_share) == ("raw", True)
        assert (job.kwargs["start"], job.kwargs["length"]) == (1024, 2048)

    def test_people_see_only_data_that_is_not_known_to_be_zero(self, replace: Any) -> None:
        replace(map_job, "map_extents", lambda *_, **__: iter(ROWS))
        assert run("map", "a").out == (
            HEADER
            + "0x200           0x200           0x200           a.q\n"
            + "0x600           0x200           0               b.q\n"
        )

    def test_data_that_lies_nowhere_verbatim_stops_the_list(self, replace: Any) -> None:
        compressed = MapEntry(2048, 512, 0, True, False, True, True, None, None)
        replace(map_job, "map_extents", lambda *_, **__: iter([ROWS[1], compressed, ROWS[3]]))
        result = run("map", "a")
        assert result.out == HEADER + "0x200           0x200           0x200           a.q\n"
        assert result.err == "qimg: File contains external, encrypted or compressed clusters.\n"
        assert result.code == 1

    def test_an_image_that_cannot_be_opened_prints_no_header(self, replace: Any) -> None:
        def fail(*_: Any, **__: Any) -> Any:
            raise OpenError("a", "x")
            yield

        replace(map_job, "map_extents", fail)
        for words in (["map", "a"], ["map", "--output=json", "a"]):
            assert run(*words) == (1, "", "qimg: Could not open 'a': x\n")

    def test_several_files_in_json_are_an_array_of_arrays(self, replace: Any) -> None:
        import json

        def answer(spec: Any, **_: Any) -> Any:
            if spec.text == "bad":
                raise OpenError("bad", "x")
            yield from ROWS[:2]
            if spec.text == "breaks":
                raise QimgError("Could not read file metadata: Input/output error")

        replace(map_job, "map_extents", answer)
        result = run("map", "--output=json", "a", "bad", "breaks", "b")
        assert [len(one) for one in json.loads(result.out)] == [2, 0, 2, 2]
        assert result.code == 1
        assert run("map", "a", "b").out.count(HEADER) == 2


class TestMeasure:
    def test_every_option_reaches_the_job(self, replace: Any) -> None:
        job = replace(measure_job, "measure", Measure(1, 2))
        words = ["-O", "qcow2", "-o", "a=1,b", "-f", "raw", "-U", "-l", "snapshot.id=1,snapshot.name=s"]
        result = run("measure", *words, "a")
        assert (job.args[0].text, job.args[0].format, job.args[0].force_share) == ("a", "raw", True)
        assert job.kwargs["output_format"] == "qcow2"
        assert job.kwargs["options"] == [("a", "1"), ("b", "on")]
        assert (job.kwargs["snapshot"].id, job.kwargs["snapshot"].name) == ("1", "s")
        assert result == (0, "required size: 1\nfully allocated size: 2\n", "")

    def test_a_size_needs_no_image(self, replace: Any) -> None:
        job = replace(measure_job, "measure", Measure(1, 2))
        assert run("measure", "--size", "1M", "--output=json").out == (
            '{\n    "required": 1,\n    "fully-allocated": 2\n}\n'
        )
        assert job.args == (None,)
        assert job.kwargs["size"] == 1 << 20

    def test_wrong_creation_options_are_told_in_two_lines(self, replace: Any) -> None:
        replace(measure_job, "measure", measure_job.OptionsRefused("Invalid parameter 'x'"))
        assert run("measure", "-O", "qcow2", "-o", "x=1", "--size", "1") == (
            1,
            "",
            "qimg: Invalid parameter 'x'\nqimg: Invalid options for file format 'qcow2'\n",
        )


class TestConvert:
    def request(self, replace: Any, *words: str) -> convert_job.ConvertRequest:
        job = replace(convert_job, "convert")
        result = run("convert", *words)
        assert result == (0, "", "")
        request = job.args[0]
        assert isinstance(request, convert_job.ConvertRequest)
        return request

    def test_defaults(self, replace: Any) -> None:
        request = self.request(replace, "a", "b", "c")
        assert [spec.text for spec in request.sources] == ["a", "b"]
        assert [(spec.cache, spec.format) for spec in request.sources] == [("writeback", None)] * 2
        assert request.target == "c"
        assert (request.output_format, request.create, request.cache) == (None, True, "unsafe")
        assert (request.sparse_size, request.workers, request.rate_limit) == (4096, 8, 0)

    def test_every_option_reaches_the_job(self, replace: Any) -> None:
        words = (
            "-c -p -q -f raw -O qcow2 -o a=1 -o b -B base -F raw -S 64k -m 3 -W -r 1M -t none -T directsync"
            " -U --salvage --bitmaps --skip-broken-bitmaps -l snap a b"
        )
        request = self.request(replace, *words.split())
        (source,) = request.sources
        assert (source.format, source.cache, source.force_share) == ("raw", "directsync", True)
        assert (request.output_format, request.options) == ("qcow2", [("a", "1"), ("b", "on")])
        assert (request.backing, request.backing_format) == ("base", "raw")
        assert (request.sparse_size, request.workers, request.rate_limit) == (65536, 3, 1 << 20)
        assert (request.compress, request.out_of_order, request.salvage, request.quiet) == (True,) * 4
        assert (request.bitmaps, request.skip_broken_bitmaps, request.cache) == (True, True, "none")
        assert request.snapshot is not None
        assert request.snapshot.id_or_name == "snap"

    def test_an_existing_target(self, replace: Any) -> None:
        request = self.request(replace, "-n", "--target-is-zero", "--target-image-opts", "-C", "a", "k=v")
        assert (request.create, request.target_is_zero, request.target_image_opts) == (False, True, True)
        assert request.copy_offload is True

    def test_writing_everything(self, replace: Any) -> None:
        assert self.request(replace, "-S", "0", "a", "b").sparse_size == 0

    @pytest.mark.parametrize("option", ["-s", "-l"])
    def test_a_snapshot_may_be_named_in_the_old_way(self, replace: Any, option: str) -> None:
        snapshot = self.request(replace, option, "id=1", "a", "b").snapshot
        assert snapshot is not None
        assert (snapshot.id_or_name, snapshot.id, snapshot.name) == ("id=1", None, None)

    def test_the_old_way_knows_no_keys(self, replace: Any) -> None:
        snapshot = self.request(replace, "-s", "snapshot.id=1", "a", "b").snapshot
        assert snapshot is not None
        assert snapshot.id_or_name == "snapshot.id=1"

    def test_a_bare_snapshot_key_is_deprecated(self, replace: Any) -> None:
        job = replace(convert_job, "convert")
        result = run("convert", "-l", "snapshot.id", "a", "b")
        assert job.args[0].snapshot.id == "on"
        assert result.err == (
            "qimg: warning: short-form boolean option 'snapshot.id' deprecated\n"
            "Please use snapshot.id=on instead\n"
        )

    def test_notices_are_warnings_or_plain_remarks(self, replace: Any) -> None:
        def answer(_: Any, context: Any, **__: Any) -> None:
            context.warn(Notice("Skipping inconsistent bitmap 'b1'"))
            context.warn(Notice("WARNING: a remark", plain=True))
            context.warn(Notice("text", hint="and a hint"))

        replace(convert_job, "convert", answer)
        assert run("convert", "a", "b").err == (
            "qimg: warning: Skipping inconsistent bitmap 'b1'\nWARNING: a remark\n"
            "qimg: warning: text\nand a hint\n"
        )


class TestAnything:
    @pytest.mark.parametrize(
        ("error", "line"),
        [
            (MemoryError(), "qimg: Cannot allocate memory\n"),
            (RecursionError(), "qimg: The image nests its structures too deeply\n"),
            (OSError(28, "No space left on device"), "qimg: No space left on device\n"),
            (OSError(2, "No such file or directory", "x"), "qimg: x: No such file or directory\n"),
            (KeyError("k"), "qimg: Internal error (QIMG_DEBUG=1 shows more): KeyError: 'k'\n"),
        ],
    )
    def test_whatever_is_raised_becomes_one_line(self, replace: Any, error: Exception, line: str) -> None:
        replace(info_job, "info", error)
        assert run("info", "a") == (1, "", line)

    def test_the_traceback_is_there_for_those_who_ask(self, replace: Any) -> None:
        replace(info_job, "info", KeyError("k"))
        result = run_qimg_inprocess(["info", "a"], env={"QIMG_DEBUG": "1"}, prog="qimg")
        assert "Traceback (most recent call last):" in result.err
        assert result.err.endswith("KeyError: 'k'\n")

    def test_messages_begin_with_the_name_that_the_program_was_called_by(self, replace: Any) -> None:
        replace(info_job, "info", QimgError("text"))
        assert run("info", "a", prog="/opt/bin/qemu-img").err == "qemu-img: text\n"
        assert run("info", "a", prog="./myimg").err == "myimg: text\n"
        assert run("info", "a", prog="/x/qimg/__main__.py").err == "qimg: text\n"

    def test_only_the_module_of_the_command_is_imported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [name for name in sys.modules if name.startswith("qimg.cli.cmd_")]:
            monkeypatch.delitem(sys.modules, name)
        run("map")
        assert [name for name in sys.modules if name.startswith("qimg.cli.cmd_")] == ["qimg.cli.cmd_map"]
