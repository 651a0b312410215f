"""Images of a Ceph cluster: what every storage promises, and every command beside the real program.

All in one module, for the cluster takes some seconds to start.
"""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import pytest

from conformance import storage_suite
from conformance.storage_suite import StorageSuite
from qimg.context import Context
from qimg.errors import NotSupported
from qimg.extent import MAPPED, ZERO
from qimg.storage import clibrary, registry
from qimg.storage.base import Storage
from support import release7
from support.build import pattern
from support.ceph_cluster import Cluster, ceph_cluster
from support.run import Result, run_qimg_inprocess, run_real

pytestmark = pytest.mark.peer("ceph-mon", "ceph-osd", "ceph", "qemu-img")

MIB = 1 << 20


@pytest.fixture(scope="module")
def cluster():
    with ceph_cluster() as running:
        yield running


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "source.raw"
    path.write_bytes(pattern("S", 0, MIB) + bytes(7 * MIB) + pattern("S", 8 * MIB, 4 * MIB))
    return path


def named(cluster: Cluster, name: str) -> str:
    """The name of image `name` of the pool."""
    return f"rbd:rbd/{name}:conf={cluster.configuration}"


class TestRbd(StorageSuite):
    numbers = count()

    @pytest.fixture(autouse=True)
    def _cluster(self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cluster = cluster
        monkeypatch.setattr(storage_suite, "EXAMPLES", 10)

    def make(self, folder: Path, size: int) -> Storage:
        kind = registry.get("rbd")
        place = kind.from_options(kind.parse(named(self.cluster, f"s{next(self.numbers)}")), create=True)
        place.start_new({}, Context())
        place.resize(size)
        return place

    def test_extents_tell_data_from_holes(self, place: Storage) -> None:
        """By whole objects: the store in memory knows no smaller holes."""
        place.resize(12 * MIB)
        place.write(pattern("A", 4 * MIB, 4 * MIB), 4 * MIB)
        found = [extent[:3] for extent in storage_suite.whole(place, 0, 12 * MIB)]
        assert found == [(0, 4 * MIB, ZERO), (4 * MIB, 4 * MIB, MAPPED), (8 * MIB, 4 * MIB, ZERO)]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("rbd:p/i", {"pool": "p", "namespace": "", "image": "i"}),
        ("rbd:p/n/i@s", {"pool": "p", "namespace": "n", "image": "i", "snapshot": "s"}),
        (r"rbd:p\/q/a\@b\:c@d\@e", {"pool": "p/q", "namespace": "", "image": "a@b:c", "snapshot": "d@e"}),
        (
            r"rbd:p/i:id=u:conf=/a\:b",
            {"pool": "p", "namespace": "", "image": "i", "user": "u", "conf": "/a:b"},
        ),
    ],
)
def test_a_name_says_pool_namespace_image_and_snapshot(name: str, values: dict[str, str]) -> None:
    assert registry.get("rbd").parse(name) == values


def same_name(text: str) -> str:
    """`text` with json: names in one order of keys, and without the size of objects, which ours lacks."""
    lines = []
    for line in text.splitlines():
        head, mark, name = line.partition("json:")
        if '"filename"' in line and mark:
            name = json.loads('"' + name.removesuffix('",') + '"')
        if "cluster" not in head:
            lines.append(head + mark + (json.dumps(json.loads(name), sort_keys=True) if mark else ""))
    return "\n".join(lines)


@pytest.fixture(scope="module")
def made(cluster: Cluster) -> None:
    """a: 8 MiB, empty; q: qcow2; k: with a snapshot."""
    for format, name in (("raw", "a"), ("qcow2", "q"), ("raw", "k")):
        run_real(["create", "-q", "-f", format, named(cluster, name), "8M"]).ok()
    cluster.run("rbd", "snap", "create", "rbd/k@one")


@pytest.mark.usefixtures("made")
@pytest.mark.parametrize(
    "line",
    [
        "info A",
        "info --output=json -f raw A",
        "info Q",
        "map -f raw --output=json A",
        "check Q",
        "measure -O qcow2 A",
        "info K",
        "snapshot -l K",
        "info rbd:rbd/k@one:conf=C",
        "info rbd:rbd/k@two:conf=C",
        "info rbd:rbd/none:conf=C",
        "info rbd:nopool/none:conf=C",
        "info rbd:",
        "info rbd:rbd/a:badkey",
        "info rbd:rbd/a:conf=/nonexist",
        "info rbd:rbd/a:conf=C:id=nobody",
        "info rbd:rbd/a:conf=C:foo=bar",
        "info rbd:rbd/a:id=x:conf=C:id=admin",
        r"info rbd:rbd/we\@ird\:x:conf=C",
        "create A 32M",
        "create rbd:rbd/a@x:conf=C 1M",
        "create rbd:nopool/a:conf=C 1M",
        "create -o cluster_size=3M rbd:rbd/d:conf=C 8M",
        "info --image-opts driver=raw,file.driver=rbd,file.pool=rbd,file.image=a,file.conf=C",
        "info --image-opts driver=raw,file.driver=rbd,file.image=a,file.conf=C",
        "info --image-opts driver=raw,file.driver=rbd,file.pool=rbd,file.conf=C",
    ],
)
def test_it_is_told_like_the_real_program_tells_it(cluster: Cluster, line: str) -> None:
    words = [_word(cluster, word) for word in line.split()]
    real, ours = run_real(words), run_qimg_inprocess(words)
    told = (
        release7.map_json(ours.out)
        if words[0] == "map"
        else release7.info_human(release7.info_json(ours.out))
    )
    assert (ours.code, same_name(told)) == (real.code, same_name(real.out))
    assert release7.errors(ours.err) == real.err


def _word(cluster: Cluster, word: str) -> str:
    if word in ("A", "K", "Q"):
        return named(cluster, word.lower())
    return word.replace("conf=C", f"conf={cluster.configuration}")


def test_snapshots_of_the_image_are_made_used_and_deleted(cluster: Cluster) -> None:
    names = [named(cluster, name) for name in ("snap-real", "snap-ours")]
    for name in names:
        run_real(["create", "-q", name, "8M"]).ok()
    for words in (["-c", "one"], ["-c", "one"], ["-a", "one"], ["-a", "two"], ["-d", "one"], ["-d", "one"]):
        real = run_real(["snapshot", *words, names[0]])
        ours = run_qimg_inprocess(["snapshot", *words, names[1]])
        assert ours.code == real.code
        listed = [
            cluster.run("rbd", "snap", "ls", "--format", "json", f"rbd/snap-{who}")
            for who in ("real", "ours")
        ]
        real_list, our_list = ([(row["name"], row["size"]) for row in json.loads(text)] for text in listed)
        assert our_list == real_list


def test_going_back_to_a_snapshot_brings_its_bytes_back(cluster: Cluster, source: Path) -> None:
    name = named(cluster, "back")
    run_qimg_inprocess(["convert", "-O", "raw", str(source), name]).ok()
    run_qimg_inprocess(["snapshot", "-c", "one", name]).ok()
    run_qimg_inprocess(["bench", "-q", "-f", "raw", "-w", "-c", "4", "--pattern", "9", name]).ok()
    assert run_real(["compare", "-f", "raw", "-F", "raw", str(source), name]).code == 1
    run_qimg_inprocess(["snapshot", "-a", "one", name]).ok()
    run_real(["compare", "-f", "raw", "-F", "raw", str(source), name]).ok()


@pytest.mark.parametrize("format", ["raw", "qcow2", "vmdk"])
@pytest.mark.parametrize("more", [[], ["-W", "-m", "4"]], ids=["", "-W"])
def test_a_conversion_into_an_image_is_what_the_real_program_reads(
    cluster: Cluster, source: Path, format: str, more: list[str]
) -> None:
    name = named(cluster, f"new-{format}{len(more)}")
    for words in (["convert"], ["convert", "-n"]) if format != "vmdk" else (["convert"],):
        run_qimg_inprocess([*words, *more, "-O", format, str(source), name]).ok()
        for run in (run_real, run_qimg_inprocess):
            run(["compare", "-f", "raw", "-F", format, str(source), name]).ok()


def test_an_overlay_on_an_image_is_changed_and_committed(cluster: Cluster, source: Path, work: Path) -> None:
    base = named(cluster, "base")
    ours = lambda *words: run_qimg_inprocess(words).ok()  # noqa: E731
    ours("convert", "-O", "qcow2", str(source), base)
    ours("create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, "top.qcow2")
    run_real(["bench", "-q", "-w", "-c", "4", "-S", "1M", "--pattern", "7", "top.qcow2"]).ok()
    run_real(["convert", "-O", "raw", "top.qcow2", "expected.raw"]).ok()
    ours("commit", "top.qcow2")
    ours("dd", "bs=1M", "count=12", f"if={base}", "of=copy.raw")
    assert Path("copy.raw").read_bytes() == Path("expected.raw").read_bytes()
    ours("resize", base, "16M")
    run_real(["check", base]).ok()


def test_the_size_of_objects_is_as_asked_for(cluster: Cluster) -> None:
    run_qimg_inprocess(["create", "-o", "cluster_size=1M", named(cluster, "objects"), "8M"]).ok()
    assert json.loads(cluster.run("rbd", "info", "--format", "json", "rbd/objects"))["object_size"] == MIB


def test_a_failed_creation_removes_its_image(cluster: Cluster) -> None:
    told: Result = run_qimg_inprocess(["create", "-f", "qcow2", named(cluster, "failed"), "1E"])
    assert told.code == 1
    assert "failed" not in cluster.run("rbd", "ls").split()


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr(clibrary.ctypes, "CDLL", missing)
    kind = registry.get("rbd")
    with pytest.raises(NotSupported, match=r"librados \(Debian: apt-get install librados2\)$"):
        kind.from_options(kind.parse("rbd:p/i"))
