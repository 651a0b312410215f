"""Every command on images in an object store. The real program has none: it does the same to local files, and
looks at the objects after they were fetched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.build import pattern
from support.moto import BUCKET, S3Server, s3_server
from support.run import Result, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("qemu-img")

MIB = 1 << 20
URL = f"s3://{BUCKET}/"


@pytest.fixture(scope="module")
def server():
    with s3_server() as running:
        yield running


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 MiB with data, zeros and a hole."""
    path = tmp_path_factory.mktemp("source") / "source.raw"
    with path.open("wb") as file:
        file.write(pattern("S", 0, MIB) + bytes(MIB))
        file.seek(5 * MIB)
        file.write(pattern("S", 5 * MIB, 2 * MIB))
        file.truncate(8 * MIB)
    return path


@pytest.fixture
def place(server: S3Server, work: Path, source: Path) -> Place:
    return Place(server, work, source)


class Place:
    """A folder with local files, and the bucket with objects of the same names."""

    def __init__(self, server: S3Server, folder: Path, source: Path) -> None:
        self.server = server
        self.folder = folder
        self.source = source

    def ours(self, *words: str) -> Result:
        """Our program; words that end in ``.img`` are objects."""
        return run_qimg_inprocess([self._object(word) for word in words], env=self.server.environment)

    def _object(self, word: str) -> str:
        name = word.removeprefix("of=").removeprefix("if=")
        return word[: -len(name)] + URL + name if name in ("a.img", "b.img", "c.img") else word

    def real(self, *words: str) -> Result:
        return run_real(words)

    def store(self, *names: str) -> None:
        """Put local files into the bucket."""
        for name in names:
            self.server.put(name, (self.folder / name).read_bytes())

    def fetch(self, name: str) -> str:
        """An object as a local file."""
        path = self.folder / f"fetched-{name}"
        path.write_bytes(self.server.get(name))
        return str(path)

    def make(self, *, backing: bool = False) -> None:
        """a.img in qcow2, here and there; with `backing` on b.img."""
        self.real("convert", "-O", "qcow2", str(self.source), "b.img").ok()
        if backing:
            self.real("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "b.img", "a.img").ok()
            self.real("bench", "-q", "-w", "-c", "4", "-S", "1M", "-s", "64k", "--pattern", "7", "a.img")
        else:
            (self.folder / "b.img").rename("a.img")
        self.store(*(["a.img", "b.img"] if backing else ["a.img"]))


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("raw", ""),
        ("qcow2", ""),
        ("qcow2", "compression_type=zstd"),
        ("vmdk", ""),
        ("vmdk", "subformat=streamOptimized"),
        ("vdi", ""),
        ("vpc", "force_size=on"),
        ("vhdx", ""),
        ("qed", ""),
        ("parallels", ""),
        ("qcow", ""),
    ],
)
@pytest.mark.parametrize("more", [[], ["-W", "-m", "3"]], ids=["", "-W"])
def test_every_format_is_written_into_an_object(
    place: Place, format: str, options: str, more: list[str]
) -> None:
    words = ["-o", options] if options else []
    place.ours("convert", *more, "-O", format, *words, str(place.source), "a.img").ok()
    place.real("compare", "-f", "raw", "-F", format, str(place.source), place.fetch("a.img")).ok()
    assert (
        place.ours("compare", "-F", format, str(place.source), "a.img").ok().out == "Images are identical.\n"
    )
    assert place.server.uploads() == []


def test_a_compressed_image_is_written_into_an_object(place: Place) -> None:
    place.ours("convert", "-c", "-O", "qcow2", str(place.source), "a.img").ok()
    place.real("compare", str(place.source), place.fetch("a.img")).ok()


def test_dd_writes_an_object(place: Place) -> None:
    words = ["bs=1M", "skip=1", "count=6", "-O", "qcow2", f"if={place.source}", "of=a.img"]
    place.ours("dd", *words).ok()
    place.real("dd", *words).ok()
    place.real("compare", "a.img", place.fetch("a.img")).ok()


@pytest.mark.parametrize("command", [["map"], ["check"], ["measure", "-O", "raw"], ["snapshot", "-l"]])
def test_what_is_told_of_an_object_is_what_is_told_of_a_file(place: Place, command: list[str]) -> None:
    place.make()
    words = [*command, "--output=json", "a.img"] if command != ["snapshot", "-l"] else [*command, "a.img"]
    told = place.ours(*words).ok().out.replace(URL, "").replace(', "compressed": false', "")
    assert told == place.real(*words).ok().out


def test_info_tells_of_the_object_and_of_its_backing_object(place: Place) -> None:
    place.make(backing=True)
    told = json.loads(place.ours("info", "--backing-chain", "--output=json", "a.img").ok().out)
    real = json.loads(place.real("info", "--backing-chain", "--output=json", "a.img").ok().out)
    assert [entry["filename"] for entry in told] == [URL + "a.img", URL + "b.img"]
    assert told[0]["full-backing-filename"] == URL + "b.img"
    for ours, theirs in zip(told, real, strict=True):
        for key in ("virtual-size", "format", "cluster-size", "backing-filename", "format-specific"):
            assert ours.get(key) == theirs.get(key)


CHANGES = {
    "resize": [["resize", "a.img", "12M"]],
    "shrink": [["resize", "--shrink", "a.img", "4M"]],
    "snapshots": [
        ["snapshot", "-c", "one", "a.img"],
        ["snapshot", "-c", "two", "a.img"],
        ["snapshot", "-d", "one", "a.img"],
    ],
    "amend": [["amend", "-o", "lazy_refcounts=on", "a.img"]],
    "bitmap": [["bitmap", "--add", "a.img", "bits"]],
    "rebase": [["rebase", "-u", "-b", "", "a.img"]],
    "convert": [["convert", "-n", "-O", "qcow2", "b.img", "a.img"]],
    "bench": [["bench", "-q", "-w", "-c", "4", "--pattern", "9", "a.img"]],
}


@pytest.mark.parametrize("commands", CHANGES.values(), ids=CHANGES)
def test_an_object_is_changed_like_a_file(place: Place, commands: list[list[str]]) -> None:
    place.make()
    place.real("create", "-q", "-f", "qcow2", "b.img", "8M").ok()
    place.store("b.img")
    for words in commands:
        place.ours(*words).ok()
        place.real(*words).ok()
    fetched = place.fetch("a.img")
    place.real("compare", "a.img", fetched).ok()
    place.real("check", fetched).ok()
    assert place.server.uploads() == []


@pytest.mark.parametrize(
    "words", [["commit", "a.img"], ["commit", "-d", "a.img"], ["rebase", "-b", "", "a.img"]], ids=" ".join
)
def test_a_chain_of_objects_is_changed_like_one_of_files(place: Place, words: list[str]) -> None:
    place.make(backing=True)
    if words[0] == "rebase":
        assert run_qimg_inprocess(["rebase", "-b", "", URL + "a.img"], env=place.server.environment).code == 0
    else:
        place.ours(*words).ok()
    place.real(*words).ok()
    place.real("compare", "b.img", place.fetch("b.img")).ok()
    place.real("compare", "-U", "a.img", place.fetch("a.img")).ok()


def test_a_base_that_cannot_be_written_keeps_the_overlay_full(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The overlay is emptied only after the base has been replaced."""
    from qimg.errors import StorageError
    from qimg.storage.objects import ObjectStorage

    place.make(backing=True)

    def refuse(self: ObjectStorage) -> None:
        raise StorageError("Could not write", errno=5)

    monkeypatch.setattr(ObjectStorage, "_send", refuse)
    place.real("rebase", "-u", "-F", "qcow2", "-b", URL + "b.img", "a.img").ok()
    before = (place.folder / "a.img").read_bytes()
    told = run_qimg_inprocess(["commit", str(place.folder / "a.img")], env=place.server.environment)
    assert (told.code, told.err) == (1, "qemu-img: Block job failed: Input/output error\n")
    assert (place.folder / "a.img").read_bytes() == before


def test_names_of_google_cloud_storage_reach_it(place: Place) -> None:
    environment = {"GOOGLE_BASE_URL": place.server.endpoint, "GOOGLE_BEARER_TOKEN": "token"}
    name = f"gs://{BUCKET}/google.qcow2"
    run_qimg_inprocess(["convert", "-O", "qcow2", str(place.source), name], env=environment).ok()
    told = run_qimg_inprocess(["compare", str(place.source), name], env=environment).ok()
    assert told.out == "Images are identical.\n"
    place.real("compare", str(place.source), place.fetch("google.qcow2")).ok()


def test_names_of_azure_are_known(place: Place) -> None:
    told = run_qimg_inprocess(["info", "az://container"])
    message = "'az://container' is not of the form az://CONTAINER/KEY"
    assert told.err == f"qemu-img: Could not open 'az://container': {message}\n"


def test_creating_makes_an_object_on_a_backing_object(place: Place) -> None:
    place.make()
    told = place.ours("create", "-f", "qcow2", "-F", "qcow2", "-b", URL + "a.img", "c.img").ok().out
    assert told.startswith(f"Formatting '{URL}c.img', fmt=qcow2 ")
    assert place.ours("compare", str(place.source), "c.img").ok().out == "Images are identical.\n"


NO_BUCKET = "Could not look at the object: 404 Not Found: The specified bucket does not exist"
NO_KEY = "Could not look at the object: 404 Not Found: The specified key does not exist."


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", URL + "none"], f"Could not open '{URL}none': {NO_KEY}"),
        (["info", "s3://nobucket/a"], f"Could not open 's3://nobucket/a': {NO_BUCKET}"),
        (["create", "s3://nobucket/a", "1M"], f"s3://nobucket/a: {NO_BUCKET}"),
        (["create", URL + "c", "6T"], f"{URL}c: An object cannot be larger than 5497558138880 bytes"),
        (["info", "s3://b"], "Could not open 's3://b': 's3://b' is not of the form s3://BUCKET/KEY"),
    ],
)
def test_what_cannot_be_is_one_line(place: Place, words: list[str], message: str) -> None:
    told = place.ours(*words)
    assert (told.code, told.err) == (1, f"qemu-img: {message}\n")
