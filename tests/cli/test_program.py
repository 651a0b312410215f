"""The program as a whole: names, version, help, and what a broken stdout or stderr does (nothing)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qimg
from qimg.cli import helptext
from qimg.cli.main import COMMANDS, program_name
from support.run import command, run_qimg, run_qimg_inprocess

SCRIPT = Path(__file__).parents[2] / "bin" / "qimg"


@pytest.fixture
def image(work: Path) -> Path:
    run_qimg_inprocess(["create", "-q", "-f", "raw", "a.raw", "1M"]).ok()
    return work


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("qimg", "qimg"),
        ("/usr/local/bin/qemu-img", "qemu-img"),
        ("./myimg", "myimg"),
        ("/lib/qimg/__main__.py", "qimg"),
        ("-c", "qimg"),
        ("", "qimg"),
    ],
)
def test_the_program_is_called_what_it_was_called_by(path: str, name: str) -> None:
    assert program_name(path) == name


class TestVersion:
    def test_a_drop_in_prints_a_first_line_that_callers_can_parse(self) -> None:
        """OpenStack matches ``qemu-img version ([0-9.]+)`` at the start; others want X.Y.Z and a blank."""
        result = run_qimg_inprocess(["--version"], prog="qemu-img").ok()
        assert len(result.lines) == 2
        found = re.match(r"qemu-img version (\d+\.\d+\.\d+) \(qimg (\S+)\)$", result.lines[0])
        assert found is not None
        assert int(found[1].partition(".")[0]) >= 10
        assert found[2] == qimg.__version__
        assert result.lines[1].startswith("Copyright (c) ")

    def test_under_its_own_name_it_prints_its_own_version(self) -> None:
        result = run_qimg_inprocess(["-V"], prog="qimg").ok()
        assert result.lines[0].startswith(f"qimg version {qimg.__version__} ")
        assert len(result.lines) == 2

    def test_the_first_of_help_and_version_wins(self) -> None:
        assert len(run_qimg_inprocess(["-Vh"]).lines) == 2
        assert "usage:" in run_qimg_inprocess(["-hV"]).out


class TestHelp:
    def test_it_has_the_lines_that_scripts_look_for(self) -> None:
        lines = run_qimg_inprocess(["--help"], prog="qemu-img").ok().lines
        assert lines[0].startswith("qemu-img version ")
        assert lines[2] == "usage: qemu-img [standard options] command [command options]"
        start = lines.index("Command syntax:")
        listed = [line.split()[0] for line in lines[start + 1 : start + 1 + len(COMMANDS)]]
        assert listed == list(COMMANDS)
        assert all(line.startswith("  ") for line in lines[start + 1 : start + 1 + len(COMMANDS)])
        assert lines[start + 1 + len(COMMANDS)] == ""
        (formats,) = [line for line in lines if line.startswith("Supported formats: ")]
        names = formats.removeprefix("Supported formats: ").split(" ")
        assert names == sorted(names)
        assert {"file", "qcow2", "raw"} <= set(names)

    def test_all_commands_have_their_syntax_and_options_explained(self) -> None:
        assert list(helptext.SYNTAX) == list(helptext.OPTIONS) == list(helptext.SUMMARIES) == list(COMMANDS)

    @pytest.mark.parametrize("name", COMMANDS)
    @pytest.mark.parametrize("words", [["-h"], ["--help"], ["x", "--help"], ["--hel", "a", "b", "c", "d"]])
    def test_each_command_helps_whatever_its_operands(self, name: str, words: list[str]) -> None:
        size = ["1M"] if name == "resize" else []  # its last word is a size, whatever it looks like
        result = run_qimg_inprocess([name, *words, *size], prog="qimg")
        assert (result.code, result.err) == (0, "")
        assert "usage: qimg [standard options] command [command options]" in result.lines
        assert f"{name}: {helptext.SUMMARIES[name]}" in result.lines
        assert "Command syntax:" in result.lines

    def test_an_unknown_option_before_it_wins(self) -> None:
        assert run_qimg_inprocess(["info", "-z", "--help"]).code == 1

    def test_as_the_value_of_an_option_it_is_a_value(self) -> None:
        assert "Unknown driver '--help'" in run_qimg_inprocess(["info", "-f", "--help", "x"]).err

    def test_measure_prints_it_after_a_wrong_option_and_fails(self) -> None:
        result = run_qimg_inprocess(["measure", "-z"])
        assert (result.code, result.err) == (1, "measure: invalid option -- 'z'\n")
        assert "usage: qemu-img" in result.out


class TestCommands:
    def test_every_listed_command_exists(self) -> None:
        for place in COMMANDS.values():
            module, _, function = place.partition(":")
            assert callable(getattr(__import__(module, fromlist=[function]), function))

    def test_the_hint_names_the_program(self) -> None:
        assert run_qimg_inprocess([], prog="/bin/qemu-img").err == (
            "qemu-img: Not enough arguments\nTry 'qemu-img --help' for more information\n"
        )
        assert run_qimg_inprocess(["frob"], prog="qimg").err == (
            "qimg: Command not found: frob\nTry 'qimg --help' for more information\n"
        )


class TestProcess:
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(Path(qimg.__file__).parents[1])}

    def test_a_link_named_qemu_img_is_a_drop_in(self, image: Path) -> None:
        os.symlink(SCRIPT, image / "qemu-img")
        words = [sys.executable, "qemu-img", "info", "missing"]
        done = subprocess.run(
            words, cwd=image, env=self.environment(), capture_output=True, text=True, check=False
        )
        assert done.stderr.startswith("qemu-img: Could not open 'missing'")
        assert done.returncode == 1

    def test_python_runs_it_as_a_module(self, image: Path) -> None:
        words = [sys.executable, "-m", "qimg", "info", "-f", "raw", "a.raw"]
        done = subprocess.run(
            words, cwd=image, env=self.environment(), capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("image: a.raw\n")

    def shell(self, image: Path, redirection: str, *words: str) -> subprocess.CompletedProcess[str]:
        bash = shutil.which("bash")
        assert bash is not None
        script = f'"$@" {redirection}'
        return subprocess.run(
            [bash, "-c", script, "-", *command("qimg"), *words],
            cwd=image,
            capture_output=True,
            text=True,
            check=False,
        )

    @pytest.mark.parametrize("words", [["info", "a.raw"], ["--help"], ["map", "--output=json", "a.raw"]])
    @pytest.mark.parametrize("redirection", [">&-", ">/dev/full", "> >(exec >&- <&-; sleep 0.2)"])
    def test_a_closed_or_full_stdout_is_no_error(
        self, image: Path, redirection: str, words: list[str]
    ) -> None:
        done = self.shell(image, redirection, *words)
        assert (done.returncode, done.stderr) == (0, "")

    def test_the_code_stays_that_of_the_work(self, image: Path) -> None:
        (image / "b.raw").write_bytes(b"x" * (1 << 20))
        done = self.shell(image, ">/dev/full", "compare", "-p", "a.raw", "b.raw")
        assert (done.returncode, done.stderr) == (1, "")

    def test_a_closed_stderr_is_harmless(self, image: Path) -> None:
        done = self.shell(image, "2>&-", "info", "missing")
        assert (done.returncode, done.stdout) == (1, "")

    def test_with_everything_closed_no_output_lands_in_an_image(self, image: Path) -> None:
        """The image must not get descriptor 1 or 2."""
        done = self.shell(image, "<&- >&- 2>&-", "convert", "-p", "a.raw", "b.raw")
        assert done.returncode == 0
        assert (image / "b.raw").read_bytes() == bytes(1 << 20)

    def test_long_output_to_a_reader_that_leaves_early_is_no_error(self, image: Path) -> None:
        with open(image / "holes.raw", "wb") as file:
            for n in range(5000):
                file.seek(n * 65536)
                file.write(b"x" * 4096)
        done = self.shell(image, "| head -c 10", "map", "--output=json", "holes.raw")
        assert done.stderr == ""

    @pytest.mark.parametrize(
        "words",
        [
            ["info", "a.qcow2"],
            ["check", "a.qcow2"],
            ["map", "--output=json", "a.qcow2"],
            ["convert", "-O", "raw", "a.qcow2", "b.raw"],
            ["convert", "-c", "-O", "qcow2", "data.raw", "b.qcow2"],
            ["compare", "data.raw", "data.raw"],
        ],
        ids=" ".join,
    )
    def test_a_gibibyte_of_address_space_is_enough_and_success_is_silent(
        self, image: Path, words: list[str]
    ) -> None:
        """OpenStack's limits; it takes anything on stderr for a failure (decisions 9)."""
        (image / "data.raw").write_bytes(os.urandom(1 << 20) * 24)
        run_qimg_inprocess(["convert", "-O", "qcow2", "data.raw", "a.qcow2"]).ok()
        limited = ["bash", "-c", 'ulimit -v 1048576 && exec "$@"', "-", *command("qimg"), *words]
        done = subprocess.run(limited, cwd=image, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")

    def test_a_name_that_is_no_text_comes_out_as_its_bytes(self, work: Path) -> None:
        name = b"a\xff\n\xc3\xbc.raw"
        (work / os.fsdecode(name)).touch()
        result = run_qimg(["info", "-f", "raw", name], work).ok()
        assert result.out.startswith(f"image: {os.fsdecode(name)}\nfile format: raw\n")
        result = run_qimg(["info", b"missing\xff"], work)
        assert f"'{os.fsdecode(b'missing' + bytes([255]))}'" in result.err

    def test_another_locale_changes_nothing(self, image: Path) -> None:
        os.rename(image / "a.raw", image / "ü.raw")
        env = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        result = run_qimg(["info", "-f", "raw", "ü.raw"], image, env=env).ok()
        assert result.out.startswith("image: ü.raw\n")


class TestTrace:
    def test_help_lists_the_events(self) -> None:
        for words in (["-T", "help"], ["-T", "?"], ["--trace=enable=help"], ["-T", "help,file=x", "info"]):
            result = run_qimg_inprocess(words)
            assert (result.code, result.err) == (0, "")
            assert "qimg_command_begin" in result.lines

    def test_events_are_reported_on_stderr(self, image: Path) -> None:
        result = run_qimg_inprocess(["-T", "qimg_*", "info", "-f", "raw", "a.raw"]).ok()
        first, last = result.err.splitlines()
        assert re.fullmatch(r"qimg_command_begin \d+\.\d+ info", first)
        assert re.fullmatch(r"qimg_command_end \d+\.\d+ info code 0", last)

    def test_a_dash_switches_events_off_again(self, image: Path) -> None:
        words = ["-T", "qimg_*", "-T", "-qimg_command_end", "info", "-f", "raw", "a.raw"]
        assert "qimg_command_end" not in run_qimg_inprocess(words).err

    def test_a_file_takes_the_events(self, image: Path) -> None:
        (image / "events").write_text("# all\nqimg_*\n")
        words = ["-T", "events=events,file=log", "info", "-f", "raw", "a.raw"]
        assert run_qimg_inprocess(words).ok().err == ""
        assert len((image / "log").read_text().splitlines()) == 2


class TestObjects:
    def test_the_types_are_listed(self) -> None:
        for text in ("help", "?", "nosuch,help"):
            result = run_qimg_inprocess(["info", "--object", text]).ok()
            assert result.lines[0] == "List of user creatable objects:"
            assert "  secret" in result.lines

    def test_the_properties_of_a_type_are_listed(self) -> None:
        result = run_qimg_inprocess(["create", "--object", "secret,help"]).ok()
        assert result.lines == [
            "secret options:",
            "  data=<string>",
            "  file=<string>",
            "  format=<QCryptoSecretFormat>",
            "  iv=<string>",
            "  keyid=<string>",
        ]

    @pytest.mark.parametrize(
        ("text", "data"),
        [
            ("secret,id=a.b-c_1,data=x,,y", b"x,y"),
            ("qom-type=secret,id=s,data=x", b"x"),
            ('{"qom-type":"secret","id":"s","data":"x"}', b"x"),
            ("secret,id=s,data=aGVsbG8=,format=base64", b"hello"),
            ("secret,id=s,file=pw", b"pass\nword\n"),
            ("secret,id=s,file=pw64,format=base64", b"hello"),
            ("secret,id=s,data=x,data=y", b"y"),
        ],
    )
    def test_a_secret_holds_its_bytes(self, text: str, data: bytes, work: Path) -> None:
        from qimg.graph.objects import add_object

        (work / "pw").write_bytes(b"pass\nword\n")
        (work / "pw64").write_bytes(b"aGVs\nbG8=\n")
        assert add_object(text, {}).data == data
