"""Every command on a disk of an iSCSI target, beside the real program on the same disk."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from qimg.errors import NotSupported, StorageError
from qimg.storage import clibrary, registry
from support import release7
from support.build import pattern
from support.iscsi_target import NAME, PASSWORD, USER, Target, iscsi_target
from support.run import Result, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("tgtd", "qemu-img")

MIB = 1 << 20
SIZE = 16 * MIB


@pytest.fixture(scope="module")
def target():
    with iscsi_target(SIZE) as running:
        yield running


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "source.raw"
    path.write_bytes(pattern("S", 0, MIB) + bytes(3 * MIB) + pattern("S", 4 * MIB, 4 * MIB))
    return path


def both(words: list[str]) -> tuple[Result, Result]:
    """The real program, then ours."""
    return run_real(words), run_qimg_inprocess(words)


READING = [
    "info {}",
    "map -f raw --output=json {}",
    "map {}",
    "check {}",
    "measure -O qcow2 {}",
    "snapshot -l {}",
    "resize -f raw {} 8M",
    "resize -f raw --shrink {} 8M",
    "resize -f raw {} 32M",
    "create {} 32M",
    "create -o preallocation=full {} 8M",
    "info iscsi:foo",
    "info iscsi://",
    "info iscsi://127.0.0.1/iqn",
    "info iscsi://127.0.0.1/iqn/x",
    "info iscsi://127.0.0.1:1/iqn/1",
    "info {}7",
    "info iscsi://{portal}/iqn.no/1",
    "info --image-opts driver=raw,file.driver=iscsi,file.portal={portal},file.lun=1,file.transport=tcp",
    "info --image-opts driver=raw,file.driver=iscsi,file.target=x,file.transport=tcp",
    "info --image-opts driver=raw,{options},file.header-digest=x",
    "info --image-opts driver=raw,{options},file.user=u",
    "info --image-opts driver=raw,{options},file.header-digest=crc32c,file.initiator-name=iqn.x",
]


def same_name(text: str) -> str:
    """`text` with json: names in one order of keys."""
    lines = []
    for line in text.splitlines():
        head, mark, name = line.partition("json:")
        lines.append(head + mark + (json.dumps(json.loads(name), sort_keys=True) if mark else ""))
    return "\n".join(lines)


@pytest.mark.parametrize("line", READING)
def test_it_is_told_like_the_real_program_tells_it(target: Target, line: str) -> None:
    run_real(["create", "-q", "-f", "qcow2", target.url, "8M"]).ok()
    options = (
        f"file.driver=iscsi,file.portal={target.portal},file.target={NAME},file.lun=1,file.transport=tcp"
    )
    real, ours = both(line.format(target.url, portal=target.portal, options=options).split())
    assert ours.code == real.code
    told = release7.map_json(ours.out) if "json" in line else release7.info_human(ours.out)
    assert same_name(told) == same_name(real.out)
    assert release7.errors(ours.err).rstrip() == real.err.rstrip()


@pytest.mark.parametrize("format", ["raw", "qcow2", "vmdk", "vdi", "qed"])
@pytest.mark.parametrize("more", [[], ["-W", "-m", "4"]], ids=["", "-W"])
def test_a_conversion_into_it_is_what_the_real_program_reads(
    target: Target, source: Path, format: str, more: list[str]
) -> None:
    run_qimg_inprocess(["convert", *more, "-O", format, str(source), target.url]).ok()
    for run in (run_real, run_qimg_inprocess):
        run(["compare", "-f", "raw", "-F", format, str(source), target.url]).ok()


def test_what_the_real_program_wrote_is_read_and_changed(target: Target, source: Path, work: Path) -> None:
    run_real(["convert", "-O", "qcow2", str(source), target.url]).ok()
    run_qimg_inprocess(["compare", str(source), target.url]).ok()
    run_qimg_inprocess(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", target.url, "top.qcow2"]).ok()
    run_real(["bench", "-q", "-w", "-c", "4", "-S", "1M", "-s", "64k", "--pattern", "7", "top.qcow2"]).ok()
    run_real(["convert", "-O", "raw", "top.qcow2", "expected.raw"]).ok()
    for words in (["snapshot", "-c", "one"], ["resize"], ["commit"], ["dd"]):
        if words[0] == "snapshot":
            run_qimg_inprocess([*words, target.url]).ok()
        elif words[0] == "resize":
            run_qimg_inprocess(["resize", target.url, "9M"]).ok()  # of the image, not of the disk
        elif words[0] == "commit":
            run_qimg_inprocess(["commit", "top.qcow2"]).ok()
        else:
            run_qimg_inprocess(["dd", "bs=1M", "count=8", f"if={target.url}", "of=copy.raw"]).ok()
    assert Path("copy.raw").read_bytes() == Path("expected.raw").read_bytes()
    run_real(["check", target.url]).ok()


def test_a_zeroed_range_takes_no_space(target: Target) -> None:
    kind = registry.get("iscsi")
    with kind.from_options(kind.parse(target.url), writable=True) as place:
        place.write(b"x" * MIB, 0)
        place.zero(0, SIZE)
        place.flush()
    assert target.file.stat().st_blocks == 0


def test_logging_in_takes_the_right_password() -> None:
    with iscsi_target(MIB, login=True) as target:
        host = target.url.removeprefix("iscsi://")
        options = f"driver=raw,file.driver=iscsi,file.portal={target.portal},file.target={NAME},file.lun=1"
        options += f",file.transport=tcp,file.user={USER},file.password-secret=s"
        for words in (
            ["info", f"iscsi://{USER}%{PASSWORD}@{host}"],
            ["info", f"iscsi://{USER}%wrongwrong12@{host}"],
            ["info", target.url],
            ["info", "--object", f"secret,id=s,data={PASSWORD}", "--image-opts", options],
        ):
            real, ours = both(words)
            assert ours.code == real.code
            assert PASSWORD not in ours.out
            assert ours.err.rstrip() == real.err.replace("wrongwrong12", "***").rstrip()


def test_a_target_that_dies_is_an_error_and_no_wait() -> None:
    with iscsi_target(SIZE) as target:
        kind = registry.get("iscsi")
        with kind.from_options(kind.parse(target.url), writable=True) as place:
            place.write(b"x" * 512, 0)
            target.kill()
            before = time.monotonic()
            for act in (lambda: place.read(0, 512), lambda: place.write(b"y" * 512, 0), place.flush):
                with pytest.raises(StorageError, match=r"^iSCSI: "):
                    act()
        assert time.monotonic() - before < 10


def test_a_target_that_is_silent_is_given_up() -> None:
    with iscsi_target(SIZE) as target:
        kind = registry.get("iscsi")
        with kind.from_options({**kind.parse(target.url), "timeout": 1}) as place:
            target.process.send_signal(signal.SIGSTOP)
            with pytest.raises(StorageError, match=r"^iSCSI: command timed out$"):
                place.read(0, 512)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr(clibrary.ctypes, "CDLL", missing)
    kind = registry.get("iscsi")
    with pytest.raises(NotSupported, match=r"libiscsi \(Debian: apt-get install libiscsi7\)$"):
        kind.from_options(kind.parse("iscsi://127.0.0.1/iqn/1"))
