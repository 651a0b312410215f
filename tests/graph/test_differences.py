"""Where opening differs from the real program of version 7.2, each with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from graph.oracle import open_ours


@pytest.fixture
def folder(work: Path) -> Path:
    """A raw image ``a.raw`` in the working directory."""
    (work / "a.raw").write_bytes(bytes(1 << 20))
    return work


def _message(text: str, command: str = "map") -> str:
    return open_ours(text, command).err.replace(f"qemu-img: Could not open '{text}': ", "")


@pytest.mark.usefixtures("folder")
def test_a_negative_number_is_out_of_range_as_release_10_says() -> None:
    text = "json:{'driver':'raw','offset':-1,'file.filename':'a.raw'}"
    assert _message(text) == "Value '-1' is out of range for parameter 'offset'"


@pytest.mark.usefixtures("folder")
def test_a_wrong_value_for_a_null_node_is_an_error_and_no_crash() -> None:
    text = "json:{'driver':'null-co','read-zeroes':'foo'}"
    assert _message(text) == "Parameter 'read-zeroes' expects 'on' or 'off'"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("driver", "kind"),
    [("nvme", "Protocol"), ("gluster", "Protocol")],
)
def test_what_is_not_written_yet_is_refused_by_name(driver: str, kind: str) -> None:
    text = f"json:{{'driver':'{driver}','file.filename':'a.raw'}}"
    assert _message(text) == f"{kind} '{driver}' is not supported yet"


def test_an_image_that_cannot_be_read_never_passes_for_raw(work: Path) -> None:
    (work / "x").write_bytes(b"LUKS\xba\xbe\0\x01" + bytes(504))
    assert _message("x") == "Parameter 'key-secret' is required for cipher"


@pytest.mark.usefixtures("folder")
def test_vhd_is_another_name_of_vpc() -> None:
    assert _message("json:{'driver':'vhd','file.filename':'a.raw'}") == "invalid VPC image"


def test_an_image_offset_by_one_byte_can_be_mapped(folder: Path) -> None:
    # The real program fails an assertion in `map`.
    opened = open_ours("json:{'driver':'raw','offset':1,'file.filename':'a.raw'}")
    assert opened.top is not None
    assert opened.top[2] == (folder / "a.raw").stat().st_size
