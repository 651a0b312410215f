"""Any sequence of writes, at any offset, changes of slots and of the size, beside a model of plain bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qimg
from qimg.formats import registry
from qimg.storage.posix import PosixFile
from support import luks

pytestmark = pytest.mark.peer("qemu-img", "qemu-io")

SIZE = 300 * 512
SCHEMES = {
    "xts": {"cipher_alg": "aes-256"},
    "cbc": {"cipher_alg": "aes-128", "cipher_mode": "cbc", "ivgen_alg": "essiv"},
    "ctr": {"cipher_alg": "aes-128", "cipher_mode": "ctr", "ivgen_alg": "plain"},
    "blocks of 8 bytes": {"cipher_alg": "cast5-128", "cipher_mode": "cbc"},
}

_write = st.tuples(
    st.integers(0, SIZE - 1),
    st.one_of(st.integers(1, 1500), st.integers(1, SIZE)),
    st.integers(0, 255),
)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), _write),
        st.tuples(st.just("read"), _write),
        st.tuples(st.just("shrink"), st.integers(1, 3000)),
        st.tuples(st.just("slot"), st.booleans()),
    ),
    max_size=10,
)


@pytest.fixture(scope="module", params=SCHEMES)
def fresh(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of zeros."""
    path = luks.make(tmp_path_factory.mktemp("luks") / "a.luks", SIZE, **SCHEMES[request.param])
    luks.io(path, [f"write -q -z 0 {SIZE}"])
    return path


def data(length: int, seed: int) -> bytes:
    """Zeros, equal bytes or counting ones."""
    if seed < 50:
        return bytes([seed // 10]) * length
    return bytes((seed + at) % 251 for at in range(length))


def test_the_disk_is_what_was_written(fresh: Path) -> None:
    @settings(
        max_examples=8,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(_steps)
    def run(steps: list[tuple[str, object]]) -> None:
        path = Path(shutil.copy(fresh, fresh.with_name("b.luks")))
        content = bytearray(SIZE)
        for what, value in steps:
            step(path, content, what, value)
        assert luks.content(path) == content
        assert luks.our_content(path) == content

    run()


def step(path: Path, content: bytearray, what: str, value: object) -> None:
    if what == "shrink":
        assert isinstance(value, int)
        size = max(512, (len(content) - value) // 512 * 512)
        if size < len(content):
            qimg.resize(luks.name(path), size, shrink=True, context=luks.context())
            del content[size:]
    elif what == "slot":
        change: dict[str, object] = {"state": "active", "new-secret": "n", "keyslot": 1, "iter-time": 0}
        if not value:
            change = {"state": "inactive", "keyslot": 1}
        qimg.amend(luks.name(path), change, force=True, context=luks.context())
    else:
        assert isinstance(value, tuple)
        start, length, seed = value
        length = min(length, len(content) - start)
        if length > 0:
            move(path, content, start, data(length, seed), writes=what == "write")


def move(path: Path, content: bytearray, start: int, new: bytes, *, writes: bool) -> None:
    """Write `new` at `start` of the disk, or read as much; any offset, any length."""
    file = PosixFile.open(str(path), writable=True)
    with registry.get("luks").open(file, options={"key-secret": "s"}, context=luks.context()) as image:
        for extent in image.allocate(start, len(new)):
            assert extent.source is not None and extent.host is not None
            at = extent.start - start
            if writes:
                extent.source.write(new[at : at + extent.length], extent.host)
            else:
                found = extent.source.read(extent.host, extent.length)
                assert found == content[extent.start : extent.start + extent.length]
        image.flush()
    if writes:
        content[start : start + len(new)] = new
