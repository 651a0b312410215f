"""What every storage promises. A storage's own test class is two lines: a subclass and its `make`.

The content is made of 8-byte words, each its own address, so bytes that land in the wrong place show it.
"""

from __future__ import annotations

from pathlib import Path
from threading import Thread

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qimg.errors import NotSupported, QimgError, StorageError
from qimg.extent import MAPPED, ZERO, Extent, Runs
from qimg.storage.base import Storage
from support.build import pattern

KIB = 1024
SIZE = 256 * KIB
EXAMPLES = 60

_offsets = st.one_of(st.integers(0, 64), st.integers(0, SIZE // 512).map(lambda n: n * 512))
_lengths = st.one_of(st.integers(1, 64), st.integers(1, 96).map(lambda n: n * 512))
_operations = st.lists(
    st.one_of(
        st.tuples(st.just("write"), _offsets, _lengths, st.integers(1, 255)),
        st.tuples(st.just("zero"), _offsets, _lengths, st.booleans()),
        st.tuples(st.just("read"), _offsets, _lengths, st.none()),
        st.tuples(st.just("flush"), st.just(0), st.just(0), st.none()),
        st.tuples(st.just("resize"), _offsets, st.just(0), st.none()),
    ),
    max_size=12,
)


def whole(storage: Storage, start: int, length: int) -> list[Extent]:
    """The extents of a range, coalesced, after a check of what all extents promise."""
    runs = Runs(start, length)
    at = start
    for extent in storage.extents(start, length):
        runs.append(*extent[:3], extent.host, extent.source)
        assert extent.start == at
        assert extent.length > 0
        assert extent.flags in (MAPPED, ZERO, MAPPED | ZERO)
        assert extent.host == extent.start
        assert extent.source is storage
        if extent.flags & ZERO and extent.start < storage.size:
            assert not any(storage.read(extent.start, min(extent.length, 1 << 20)))
        at += extent.length
    assert at == start + length
    return runs.take()


class StorageSuite:
    """Subclass it and define `make`."""

    #: Sequences of requests that are tried; each makes a place.
    examples = EXAMPLES
    #: `resize` and writes past the end lengthen the place.
    grows = True
    #: Whole blocks of `hole` bytes never written to are reported as ZERO; None: holes are not known.
    hole: int | None = 4 * KIB
    #: Two places of this kind can copy between themselves.
    copies = False

    def make(self, folder: Path, size: int) -> Storage:
        """A new writable place of `size` bytes that read as zeros."""
        raise NotImplementedError

    @pytest.fixture
    def place(self, tmp_path: Path):
        with self.make(tmp_path, SIZE) as storage:
            yield storage

    # -- reading and writing

    def test_a_new_place_has_its_length_and_reads_as_zeros(self, place: Storage) -> None:
        assert place.size == SIZE
        assert place.read(0, SIZE) == bytes(SIZE)

    def test_what_is_written_is_read_back_at_its_place(self, place: Storage) -> None:
        place.write(pattern("A", 0, SIZE), 0)
        for start, length in ((0, SIZE), (8, 8), (504, 16), (4096, 4096), (SIZE - 8, 8), (65528, 24)):
            assert place.read(start, length) == pattern("A", start, length)

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_every_kind_of_buffer_is_written(self, place: Storage, kind: type) -> None:
        place.write(kind(pattern("B", 512, 1024)), 512)
        assert place.read(512, 1024) == pattern("B", 512, 1024)

    def test_part_of_a_buffer_is_filled(self, place: Storage) -> None:
        place.write(pattern("A", 0, 4096), 0)
        buf = bytearray(b"\xff" * 4096)
        place.read_into(memoryview(buf)[1024:2048], 512)
        assert buf == b"\xff" * 1024 + pattern("A", 512, 1024) + b"\xff" * 2048

    @pytest.mark.parametrize(("offset", "length"), [(1, 1), (511, 2), (4095, 4098), (3, 70000)])
    def test_a_write_of_odd_offset_and_length_changes_nothing_beside_it(
        self, place: Storage, offset: int, length: int
    ) -> None:
        place.write(pattern("A", 0, SIZE), 0)
        place.write(b"\xee" * length, offset)
        expected = bytearray(pattern("A", 0, SIZE))
        expected[offset : offset + length] = b"\xee" * length
        assert place.read(0, SIZE) == expected

    def test_nothing_is_written_or_read_by_an_empty_request(self, place: Storage) -> None:
        place.write(b"", 100)
        place.zero(100, 0)
        assert place.read(100, 0) == b""
        assert place.size == SIZE

    # -- the end

    def test_past_the_end_everything_reads_as_zeros(self, place: Storage) -> None:
        place.write(pattern("A", SIZE - 512, 512), SIZE - 512)
        assert place.read(SIZE - 512, 2048) == pattern("A", SIZE - 512, 512) + bytes(1536)
        assert place.read(SIZE + 4096, 512) == bytes(512)

    def test_past_the_end_everything_is_a_known_zero(self, place: Storage) -> None:
        assert [extent.flags for extent in whole(place, SIZE + 512, 1 << 40)] == [ZERO]
        assert whole(place, SIZE - 4096, 8192)[-1].flags == ZERO

    def test_a_write_past_the_end_lengthens_the_place_or_is_an_error(self, place: Storage) -> None:
        if not self.grows:
            with pytest.raises(StorageError):
                place.write(b"x" * 512, SIZE)
            return
        place.write(pattern("A", SIZE + 4096, 512), SIZE + 4096)
        assert place.size == SIZE + 4096 + 512
        assert place.read(SIZE, 4608) == bytes(4096) + pattern("A", SIZE + 4096, 512)

    def test_zeroing_past_the_end_lengthens_the_place_or_is_an_error(self, place: Storage) -> None:
        if not self.grows:
            with pytest.raises(StorageError):
                place.zero(SIZE - 512, 1024)
            return
        place.write(b"x" * 512, SIZE - 512)
        place.zero(SIZE - 256, 100000)
        assert place.size == SIZE - 256 + 100000
        assert place.read(SIZE - 512, 1024) == b"x" * 256 + bytes(768)

    # -- zeros and holes

    @pytest.mark.parametrize("unmap", [True, False])
    @pytest.mark.parametrize(("start", "length"), [(0, 4096), (512, 512), (1, 1), (4095, 8194), (0, SIZE)])
    def test_a_zeroed_range_reads_as_zeros_and_its_neighbours_stay(
        self, place: Storage, start: int, length: int, unmap: bool
    ) -> None:
        place.write(pattern("A", 0, SIZE), 0)
        place.zero(start, length, unmap)
        expected = bytearray(pattern("A", 0, SIZE))
        expected[start : start + length] = bytes(length)
        assert place.read(0, SIZE) == expected
        assert place.size == SIZE
        whole(place, 0, SIZE)

    def test_extents_tell_data_from_holes(self, place: Storage) -> None:
        place.write(pattern("A", 128 * KIB, 64 * KIB), 128 * KIB)
        found = {(extent.start, extent.flags) for extent in whole(place, 0, SIZE)}
        assert any(flags & MAPPED for _, flags in found)
        if self.hole is None:
            assert all(flags == MAPPED for _, flags in found)
            return
        assert found == {(0, ZERO), (128 * KIB, MAPPED), (192 * KIB, ZERO)}

    def test_extents_are_clipped_to_the_range_asked_for(self, place: Storage) -> None:
        place.write(pattern("A", 0, SIZE), 0)
        assert [tuple(extent[:3]) for extent in whole(place, 1000, 5000)] == [(1000, 5000, MAPPED)]

    def test_discarding_leaves_the_rest_alone(self, place: Storage) -> None:
        place.write(pattern("A", 0, SIZE), 0)
        place.discard(64 * KIB, 64 * KIB)
        assert place.size == SIZE
        assert place.read(0, 64 * KIB) == pattern("A", 0, 64 * KIB)
        assert place.read(128 * KIB, 64 * KIB) == pattern("A", 128 * KIB, 64 * KIB)

    # -- length

    def test_resizing_cuts_and_lengthens_with_zeros(self, place: Storage) -> None:
        place.write(pattern("A", 0, SIZE), 0)
        if not self.grows:
            with pytest.raises(NotSupported):
                place.resize(SIZE + 512)
            assert place.size == SIZE
            return
        place.resize(1000)
        place.resize(5000)
        assert place.size == 5000
        assert place.read(0, 5000) == pattern("A", 0, 1000) + bytes(4000)

    # -- the rest

    def test_flushing_twice_and_closing_twice_is_fine(self, tmp_path: Path) -> None:
        place = self.make(tmp_path, SIZE)
        place.write(b"x" * 512, 0)
        place.flush()
        place.flush()
        place.close()
        place.close()

    def test_a_clone_sees_the_same_bytes(self, place: Storage) -> None:
        place.write(pattern("C", 0, 4096), 0)
        assert place.clone().read(0, 4096) == pattern("C", 0, 4096)

    def test_a_copy_between_two_places_is_exact_or_refused_before_any_change(self, tmp_path: Path) -> None:
        (tmp_path / "1").mkdir()
        (tmp_path / "2").mkdir()
        with self.make(tmp_path / "1", SIZE) as source, self.make(tmp_path / "2", SIZE) as target:
            source.write(pattern("A", 0, SIZE), 0)
            target.write(pattern("B", 0, SIZE), 0)
            try:
                target.copy_from(source, 8192, 4096, 65536)
            except NotSupported:
                assert not self.copies
                assert target.read(0, SIZE) == pattern("B", 0, SIZE)
                return
            assert target.read(4096, 65536) == pattern("A", 8192, 65536)
            assert target.read(0, 4096) == pattern("B", 0, 4096)
            assert target.read(69632, 4096) == pattern("B", 69632, 4096)

    def test_several_threads_may_read_and_write_at_once(self, place: Storage) -> None:
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for start in range(number * 512, SIZE, 8 * 512):
                    place.write(pattern("T", start, 512), start)
                    assert place.read(start, 512) == pattern("T", start, 512)
            except BaseException as error:  # noqa: BLE001 - a thread's failure must reach the test
                failures.append(error)

        threads = [Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert place.read(0, SIZE) == pattern("T", 0, SIZE)

    def test_any_sequence_of_requests_agrees_with_a_string_of_bytes(self, tmp_path: Path) -> None:
        @settings(
            max_examples=self.examples,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow],
        )
        @given(_operations)
        def run(operations: list[tuple[str, int, int, object]]) -> None:
            with self.make(tmp_path, SIZE) as place:
                model = bytearray(SIZE)
                for operation in operations:
                    self._apply(place, model, *operation)
                assert place.size == len(model)
                assert place.read(0, len(model) + 512) == model + bytes(512)
                whole(place, 0, len(model) + 512)

        run()

    def _apply(self, place: Storage, model: bytearray, kind: str, start: int, length: int, extra) -> None:
        if kind == "flush":
            place.flush()
        elif kind == "read":
            assert place.read(start, length) == bytes(model[start : start + length]).ljust(length, b"\0")
        elif kind == "resize":
            if self.grows:
                place.resize(start)
                model[:] = model[:start].ljust(start, b"\0")
        elif self.grows or start + length <= SIZE:
            data = bytes([extra]) * length if kind == "write" else bytes(length)
            if kind == "write":
                place.write(data, start)
            else:
                place.zero(start, length, extra)
            model[:] = model.ljust(start, b"\0")
            model[start : start + length] = data
        else:
            with pytest.raises(QimgError):
                place.write(b"\1" * length, start)
            low = min(start, SIZE)
            # How much of a refused write arrived is not promised.
            model[low:] = place.read(low, SIZE - low)
