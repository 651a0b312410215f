"""``s3:`` and its like: names, options, what goes wrong on the way, and that nothing half is ever left."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import qimg
from qimg.context import Context
from qimg.errors import LimitError, LocationError, NotSupported, OptionError, QimgError, StorageError
from qimg.storage import objects, registry
from qimg.storage.base import Storage
from qimg.storage.objects import MAX_PARTS, MAX_SIZE, PART, part_size
from qimg.units import KIB, MIB
from support.build import pattern
from support.faulty_http import Fault, FaultyProxy, faulty_proxy
from support.moto import BUCKET, CREDENTIALS, S3Server, s3_server


@pytest.fixture(scope="module")
def server():
    with s3_server() as running:
        yield running


@pytest.fixture(autouse=True)
def _environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(objects, "PART", 5 * MIB)  # the smallest part that stores take


@pytest.fixture
def proxy(server: S3Server):
    with faulty_proxy(server.endpoint) as running:
        yield running


def opened(url: str, key: str = "a.img", *, create: bool = False, writable: bool = False, **more) -> Storage:
    """The object, through `url`; what fails is tried again once and soon."""
    values = {"bucket": BUCKET, "key": key, "endpoint": url, "retries": 1, "timeout": 5, **more}
    return registry.get("s3").from_options(values, create=create, writable=writable or create)


# -- names


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("s3://bucket/key", {"bucket": "bucket", "key": "key"}),
        ("s3://bucket/a/b c%20d?x#y:z.qcow2", {"bucket": "bucket", "key": "a/b c%20d?x#y:z.qcow2"}),
        ("gs://bucket/a/ö", {"bucket": "bucket", "key": "a/ö"}),
        ("az://images/a/b", {"container": "images", "key": "a/b"}),
    ],
)
def test_a_name_is_a_bucket_and_a_key_as_it_stands(name: str, values: dict[str, str]) -> None:
    assert registry.get(name[:2]).parse(name) == values


@pytest.mark.parametrize(
    "name", ["s3:", "s3://", "s3://bucket", "s3://bucket/", "s3:///key", "s3:/bucket/key"]
)
def test_a_name_that_lacks_something_is_refused(name: str) -> None:
    with pytest.raises(LocationError, match=r"is not of the form s3://BUCKET/KEY$"):
        registry.get("s3").parse(name)


@pytest.mark.parametrize("key", ["a//b", "../a", "a/./b", "a/"])
def test_a_key_that_would_arrive_as_another_one_is_refused(key: str, server: S3Server) -> None:
    with pytest.raises(LocationError, match="has an empty part"):
        registry.get("s3").parse(f"s3://bucket/{key}")
    with pytest.raises(LocationError, match="has an empty part"):
        opened(server.endpoint, key)


@pytest.mark.parametrize("key", ["a b%20c?d#e", "ö/ä", "a+b&c=d", "'quoted'"])
def test_every_other_key_arrives_as_it_is(key: str, server: S3Server) -> None:
    server.put(key, b"x" * 512)
    with opened(server.endpoint, key) as place:
        assert place.read(0, 512) == b"x" * 512


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(NotSupported, match=r"obstore: pip install 'qimg\[s3\]'$"):
        opened("http://127.0.0.1:1")


# -- who asks, and where


def test_a_request_without_credentials_is_refused_by_the_server(server: S3Server) -> None:
    server.put("a.img", b"x")
    with pytest.raises(StorageError, match="403 Forbidden") as caught:
        opened(server.endpoint, anonymous=True)
    assert caught.value.reason == "Permission denied"


def test_the_key_is_taken_from_a_secret(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from obstore.store import S3Store

    made: dict[str, object] = {}

    def seen(bucket: str, *, config: dict[str, object], **more: object) -> S3Store:
        made.update(config)
        return S3Store(bucket, config=config, **more)

    monkeypatch.setattr("obstore.store.S3Store", seen)
    server.put("a.img", b"x")
    context = Context()
    monkeypatch.setattr(
        Context, "secret", lambda self, name: {"key": b"from the secret"}[name], raising=False
    )
    values = {"bucket": BUCKET, "key": "a.img", "endpoint": server.endpoint}
    values |= {"access-key-id": "me", "secret-access-key-secret": "key"}
    registry.get("s3").from_options(values, context=context).close()
    assert (made["access_key_id"], made["secret_access_key"]) == ("me", "from the secret")


def test_credentials_come_from_the_file_of_the_aws_tools(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    file = tmp_path / "credentials"
    file.write_text("[other]\naws_access_key_id = me\naws_secret_access_key = 100%secret\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "other")
    server.put("a.img", b"x")
    with opened(server.endpoint) as place:
        assert place.size == 1
    file.write_text("[other\n")
    with pytest.raises(OptionError, match=r"^Could not read the credentials in "):
        opened(server.endpoint)


def test_half_a_pair_of_credentials_is_refused(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(OptionError, match="Missing SecretAccessKey"):
        opened(server.endpoint)


def test_google_cloud_storage_is_read_and_written(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The XML interface of Google is that of S3."""
    monkeypatch.setenv("GOOGLE_BASE_URL", server.endpoint)
    monkeypatch.setenv("GOOGLE_BEARER_TOKEN", "token")
    values = {"bucket": BUCKET, "key": "google.img"}
    with registry.get("gs").from_options(values, writable=True, create=True) as place:
        place.start_new({}, Context())
        place.write(pattern("G", 0, 12 * MIB), 0)
        place.publish()
    assert server.get("google.img") == pattern("G", 0, 12 * MIB)
    with registry.get("gs").from_options(values) as place:
        assert place.read(MIB, 4096) == pattern("G", MIB, 4096)


# -- sizes


@pytest.mark.parametrize("size", [0, 1, PART * MAX_PARTS, PART * MAX_PARTS + 1, 1 << 40, MAX_SIZE])
def test_parts_are_large_enough_for_every_object(size: int) -> None:
    part = part_size(size)
    assert part >= 5 * MIB and part * MAX_PARTS >= size


def test_what_no_store_takes_is_refused(server: S3Server) -> None:
    with opened(server.endpoint, "new.img", create=True) as place:
        place.start_new({}, Context())
        with pytest.raises(LimitError, match="larger than 5497558138880 bytes"):
            place.resize(MAX_SIZE + 1)


# -- streams


def test_a_place_written_once_is_sent_while_it_is_written(server: S3Server) -> None:
    content = pattern("S", 0, 23 * MIB)
    with opened(server.endpoint, "stream.img", create=True) as place:
        place.start_new({}, Context())
        place.write_once(len(content))
        for start in (1, 0, 2, 3):  # out of order
            place.write(content[start * 5 * MIB : (start + 1) * 5 * MIB], start * 5 * MIB)
        assert server.uploads() == ["stream.img"]
        assert place._spool.allocated_bytes() <= 10 * MIB
        place.write(content[20 * MIB :], 20 * MIB)
        assert "stream.img" not in server.objects()
        place.publish()
        assert server.uploads() == []
    assert server.get("stream.img") == content


def test_what_was_sent_is_neither_changed_nor_read(server: S3Server) -> None:
    with opened(server.endpoint, "stream2.img", create=True) as place:
        place.start_new({}, Context())
        place.write_once(20 * MIB)
        place.write(bytes(11 * MIB), 0)
        for act in (lambda: place.write(b"x", 100), lambda: place.read(0, 512), lambda: place.zero(0, 512)):
            with pytest.raises(StorageError, match="What was sent already"):
                act()
    assert server.uploads() == []
    assert "stream2.img" not in server.objects()


def test_a_stream_that_is_not_published_leaves_nothing(server: S3Server) -> None:
    with opened(server.endpoint, "stream3.img", create=True) as place:
        place.start_new({}, Context())
        place.write_once(20 * MIB)
        place.write(bytes(16 * MIB), 0)
        assert server.uploads() == ["stream3.img"]
    assert server.uploads() == []
    assert "stream3.img" not in server.objects()


# -- others change the object


def test_a_read_of_an_object_that_was_replaced_is_an_error(server: S3Server) -> None:
    server.put("a.img", pattern("A", 0, 4 * MIB))
    with opened(server.endpoint) as place:
        place.read(0, 512)
        server.put("a.img", pattern("B", 0, 4 * MIB))
        with pytest.raises(StorageError, match="412 Precondition Failed"):
            place.read(3 * MIB, 512)


def test_changes_do_not_go_over_those_of_somebody_else(server: S3Server) -> None:
    server.put("a.img", bytes(MIB))
    with opened(server.endpoint, writable=True) as place:
        place.write(b"x", 0)
        server.put("a.img", b"theirs")
        with pytest.raises(StorageError, match="changed by somebody else meanwhile"):
            place.publish()
    assert server.get("a.img") == b"theirs"


# -- servers that fail


def gets(method: str, path: str) -> bool:
    return method == "GET"


def parts(method: str, path: str) -> bool:
    return method == "PUT" and "partNumber" in path


def completes(method: str, path: str) -> bool:
    return method == "POST" and "uploadId" in path


@pytest.mark.parametrize(
    "fault",
    [Fault(gets, 1, status=503), Fault(gets, 1, status=500), Fault(gets, 1, cut=0), Fault(gets, 1, cut=1000)],
    ids=["503", "500", "no answer", "cut"],
)
def test_a_read_that_fails_once_is_tried_again(server: S3Server, proxy: FaultyProxy, fault: Fault) -> None:
    server.put("a.img", pattern("A", 0, 2 * MIB))
    with opened(proxy.url) as place:
        proxy.faults = [fault]
        assert place.read(0, 2 * MIB) == pattern("A", 0, 2 * MIB)
        assert place.read(MIB, 512) == pattern("A", MIB, 512)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault(gets, status=500), "500 Internal Server Error"),
        (Fault(gets, status=403), "403 Forbidden"),
        (Fault(gets, cut=0), "."),
        (Fault(gets, cut=100_000), "."),
        (Fault(gets, delay=3), "."),
        (Fault(gets, status=200), "."),
    ],
    ids=["500", "403", "no answer", "cut", "slow", "wrong status"],
)
@pytest.mark.timeout(40)
def test_a_read_that_keeps_failing_is_one_clear_error(
    server: S3Server, proxy: FaultyProxy, fault: Fault, message: str
) -> None:
    server.put("a.img", bytes(2 * MIB))
    with opened(proxy.url, timeout=1) as place:
        proxy.faults = [fault]
        with pytest.raises(StorageError, match=rf"^Could not read: .*{message}") as caught:
            place.read(0, 2 * MIB)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_an_answer_of_another_length_is_an_error(server: S3Server, proxy: FaultyProxy) -> None:
    server.put("a.img", bytes(2 * MIB))
    with opened(proxy.url) as place:
        proxy.faults = [Fault(gets, short=512)]
        with pytest.raises(StorageError, match=r"^Could not read: "):
            place.read(0, 2 * MIB)
        with pytest.raises(StorageError, match=r"^Could not read: "):
            place.read(512, 512)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(parts, status=500),
        Fault(parts, cut=0),
        Fault(parts, 1, status=403),
        Fault(completes, status=500),
        Fault(completes, 1, status=400),
    ],
    ids=["parts 500", "parts cut", "a part refused", "end 500", "end refused"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_upload_that_fails_is_taken_back(
    server: S3Server, proxy: FaultyProxy, fault: Fault, stream: bool
) -> None:
    server.put("b.img", b"before")
    with opened(proxy.url, "b.img", create=True) as place:
        place.start_new({}, Context())
        if stream:
            place.write_once(16 * MIB)
        proxy.faults = [fault]
        with pytest.raises(StorageError, match=r"^Could not write"):
            for start in range(0, 16, 4):
                place.write(bytes(4 * MIB), start * MIB)
            place.publish()
    assert server.get("b.img") == b"before"
    assert server.uploads() == []


def test_an_upload_whose_parts_fail_once_succeeds(server: S3Server, proxy: FaultyProxy) -> None:
    with opened(proxy.url, "b.img", create=True) as place:
        place.start_new({}, Context())
        place.write(pattern("B", 0, 16 * MIB), 0)
        proxy.faults = [Fault(parts, 1, status=500), Fault(parts, 1, cut=0)]
        place.publish()
    assert server.get("b.img") == pattern("B", 0, 16 * MIB)


def test_a_server_that_is_not_there_is_told_of(server: S3Server) -> None:
    with pytest.raises(StorageError, match=r"^Could not look at the object: Connection refused$"):
        opened("http://127.0.0.1:1")


def test_what_the_server_says_is_shown_on_one_line_of_bounded_length() -> None:
    text = "x - status code: 500 Oops: <Message>a\x1b[2J\nb" + "c" * 100_000 + "</Message>\n\nDebug source"
    number, line = objects.explain(OSError(text))
    assert (number, line[:22]) == (5, "500 Oops: a [2J bcccccc"[:22])
    assert len(line) <= 200


# -- jobs


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_conversion_that_is_stopped_leaves_the_store_as_it_was(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
    source = tmp_path / "a.raw"
    source.write_bytes(pattern("A", 0, 32 * MIB))
    server.put("c.img", b"before")
    asked = iter(range(1000))
    with pytest.raises(qimg.Cancelled):
        qimg.convert(source, f"s3://{BUCKET}/c.img", format=format, cancelled=lambda: next(asked) > 8)
    assert server.get("c.img") == b"before"
    assert server.uploads() == []


def test_a_spool_that_cannot_be_made_is_told_of(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    with (
        opened(server.endpoint, "d.img", create=True) as place,
        pytest.raises(QimgError, match="temporary file"),
    ):
        place.start_new({}, Context())


def test_small_reads_fetch_whole_blocks_once(server: S3Server, proxy: FaultyProxy) -> None:
    server.put("a.img", pattern("A", 0, 8 * MIB))
    with opened(proxy.url) as place:
        proxy.seen.clear()
        for start in range(0, 512 * KIB, 4096):
            assert place.read(start, 4096) == pattern("A", start, 4096)
        assert proxy.seen == [("GET", f"/{BUCKET}/a.img")]
