"""Every command on files of an NFS server, beside the real program."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from qimg.errors import NotSupported, StorageError
from qimg.storage import clibrary, registry
from support import release7
from support.build import pattern
from support.nfs_server import NfsServer, nfs_server
from support.run import run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("ganesha.nfsd", "rpcbind", "qemu-img")

MIB = 1 << 20
URL = "nfs://127.0.0.1/vol/"


@pytest.fixture(scope="module")
def server():
    with nfs_server() as running:
        for folder in (running.files, running.fixed):
            run_real(["create", "-q", "-f", "qcow2", str(folder / "a.qcow2"), "8M"]).ok()
        yield running


@pytest.fixture(autouse=True)
def _inside(server: NfsServer):
    with server.reached():
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "source.raw"
    path.write_bytes(pattern("S", 0, MIB) + bytes(3 * MIB) + pattern("S", 4 * MIB, 4 * MIB))
    return path


@pytest.mark.parametrize(
    "line",
    [
        "info {}a.qcow2",
        "info {}a.qcow2?uid=0&gid=0&tcp-syncnt=2&readahead=65536&pagecache=4&debug=1",
        "info {}a%2eqcow2",
        "info --output=json {}a.qcow2",
        "map {}a.qcow2",
        "map -f raw --output=json {}a.qcow2",
        "check {}a.qcow2",
        "measure -O raw {}a.qcow2",
        "info {}none",
        "info nfs://127.0.0.1/none/none",
        "info nfs://127.0.0.1/vol",
        "info nfs://127.0.0.1",
        "info nfs:///x",
        "info nfs:x",
        "info {}a.qcow2?foo=1",
        "info {}a.qcow2?uid=x",
        "resize nfs://127.0.0.1/ro/a.qcow2 16M",
        "create nfs://127.0.0.1/ro/b.raw 1M",
        "create -f qcow2 -F qcow2 -b a.qcow2 {}b.qcow2 8M",
        "create -o preallocation=full {}b.raw 1M",
        "info --image-opts driver=qcow2,file.driver=nfs,file.server.host=x,file.path=/vol/a.qcow2",
        "info --image-opts driver=qcow2,file.driver=nfs,file.path=/vol/a.qcow2",
        "info --image-opts driver=qcow2,file.driver=nfs,file.server.type=inet,file.server.host=x",
        "info --image-opts file.driver=nfs,file.server.type=inet,file.server.host=127.0.0.1,file.path=/vol/b",
    ],
)
def test_it_is_told_like_the_real_program_tells_it(server: NfsServer, line: str) -> None:
    words = line.format(URL).split()
    (server.files / "b.qcow2").unlink(missing_ok=True)
    real = run_real(words)
    (server.files / "b.qcow2").unlink(missing_ok=True)
    ours = run_qimg_inprocess(words)
    told = (
        release7.map_json(ours.out)
        if words[0] == "map"
        else release7.info_human(release7.info_json(ours.out))
    )
    assert (ours.code, told) == (real.code, real.out)
    # The name of a refusal that came with 8.0.
    assert release7.errors(ours.err).replace("Invalid value for NFS", "Illegal value for NFS") == real.err


@pytest.mark.parametrize("format", ["raw", "qcow2", "vmdk", "vdi", "vhdx"])
@pytest.mark.parametrize("more", [[], ["-W", "-m", "4"]], ids=["", "-W"])
def test_a_conversion_into_a_file_is_what_the_real_program_reads(
    server: NfsServer, source: Path, format: str, more: list[str]
) -> None:
    for words in (["convert"], ["convert", "-n"] if format in ("raw", "qcow2") else ["convert"]):
        run_qimg_inprocess([*words, *more, "-O", format, str(source), URL + "new"]).ok()
        run_real(["compare", "-f", "raw", "-F", format, str(source), URL + "new"]).ok()
        run_qimg_inprocess(["compare", "-f", "raw", "-F", format, str(source), URL + "new"]).ok()


@pytest.mark.parametrize(
    "commands",
    [
        [["resize", "top.qcow2", "12M"]],
        [["snapshot", "-c", "one", "top.qcow2"], ["snapshot", "-d", "one", "top.qcow2"]],
        [["commit", "top.qcow2"]],
        [["rebase", "-b", "", "top.qcow2"]],
        [["bench", "-q", "-w", "-c", "4", "--pattern", "9", "top.qcow2"]],
        [["dd", "bs=1M", "count=3", "-O", "qcow2", "if=base.qcow2", "of=top.qcow2"]],
    ],
    ids=lambda commands: commands[0][0],
)
def test_a_file_is_changed_as_by_the_real_program(
    server: NfsServer, source: Path, commands: list[list[str]]
) -> None:
    # Folders of their own: the server remembers lengths that it has not changed itself.
    mine = f"ours-{commands[0][0]}"
    for folder in ("real", mine):
        place = server.files / folder
        place.mkdir(exist_ok=True)
        run_real(["convert", "-O", "qcow2", str(source), str(place / "base.qcow2")]).ok()
        words = ["-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", "top.qcow2"]
        run_real(["create", *words], cwd=place).ok()
        run_real(["bench", "-q", "-w", "-c", "4", "-S", "1M", "--pattern", "7", "top.qcow2"], cwd=place).ok()
    for words in commands:
        run_real(words, cwd=server.files / "real").ok()
        run_qimg_inprocess([_there(word, mine) for word in words]).ok()
    for name in ("top.qcow2", "base.qcow2"):
        run_real(["compare", str(server.files / "real" / name), str(server.files / mine / name)]).ok()
        run_real(["check", str(server.files / mine / name)]).ok()


def _there(word: str, folder: str) -> str:
    name = word.removeprefix("if=").removeprefix("of=")
    return word[: -len(name)] + f"{URL}{folder}/{name}" if name.endswith(".qcow2") else word


def test_a_failed_creation_removes_its_file(server: NfsServer) -> None:
    assert run_qimg_inprocess(["create", "-f", "qcow2", URL + "failed", "1E"]).code == 1
    assert not (server.files / "failed").exists()


@pytest.mark.parametrize("words", [["convert", "-O", "raw", "{}", "{}"], ["dd", "if={}", "of={}"]])
def test_a_file_is_not_written_over_itself(server: NfsServer, words: list[str]) -> None:
    (server.files / "mine").write_bytes(pattern("M", 0, MIB))
    told = run_qimg_inprocess([word.format(URL + "mine") for word in words])
    assert told.code == 1
    assert 'Failed to get "write" lock' in told.err
    assert (server.files / "mine").read_bytes() == pattern("M", 0, MIB)


def test_a_folder_is_refused(server: NfsServer) -> None:
    (server.files / "folder").mkdir(exist_ok=True)
    told = run_qimg_inprocess(["info", URL + "folder"])
    assert told.err == f"qemu-img: Could not open '{URL}folder': '{URL}folder' is not a regular file\n"


def test_a_file_that_becomes_shorter_is_an_error(server: NfsServer) -> None:
    path = server.files / "shrinking"
    path.write_bytes(bytes(4 * MIB))
    kind = registry.get("nfs")
    with kind.from_options(kind.parse(URL + "shrinking")) as place:
        path.write_bytes(b"")
        with pytest.raises(StorageError, match=r"^NFS: "):
            place.read(2 * MIB, MIB)


def test_a_server_that_dies_is_an_error_and_no_wait() -> None:
    with nfs_server() as server, server.reached():
        kind = registry.get("nfs")
        with kind.from_options(kind.parse(URL + "a"), create=True) as place:
            place.write(b"x" * 512, 0)
            server.process.kill()
            before = time.monotonic()
            for act in (lambda: place.read(0, 512), lambda: place.write(b"y" * 512, 0), place.flush):
                with pytest.raises(StorageError, match=r"^NFS: "):
                    act()
        assert time.monotonic() - before < 10


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr(clibrary.ctypes, "CDLL", missing)
    kind = registry.get("nfs")
    with pytest.raises(NotSupported, match=r"libnfs \(Debian: apt-get install libnfs13\)$"):
        kind.from_options(kind.parse(URL + "a"))
