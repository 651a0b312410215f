"""Storages by name: what exists, what is known and not written yet, what nobody knows."""

from __future__ import annotations

import pytest

from qimg.errors import NotSupported, OptionError
from qimg.storage import registry
from qimg.storage.base import Storage


@pytest.mark.parametrize("name", registry.supported())
def test_every_storage_calls_itself_by_its_name_and_describes_its_options(name: str) -> None:
    found = registry.get(name)
    assert issubclass(found, Storage)
    assert found.driver == name
    names = [option.name for option in found.open_options]
    assert set(found.identity) <= {"driver", *names}
    assert len(names) == len(set(names))


def test_files_and_devices_can_hold_new_images() -> None:
    # The order is the one in which ``Formatting`` prints them (create sheet).
    assert [option.name for option in registry.get("file").create_options] == [
        "size",
        "nocow",
        "preallocation",
        "extent_size_hint",
    ]
    assert [option.name for option in registry.get("host_device").create_options] == ["size", "preallocation"]
    assert registry.get("file").can_create
    assert registry.get("host_device").can_create
    assert not registry.get("null-co").can_create


@pytest.mark.parametrize("name", ["gluster", "nvme", "blkreplay"])
def test_what_is_not_written_yet_is_named(name: str) -> None:
    with pytest.raises(NotSupported, match=f"^Protocol '{name}' is not supported yet$"):
        registry.get(name)


def test_what_nobody_knows_is_named() -> None:
    with pytest.raises(OptionError, match=r"^Unknown driver 'bogus'$"):
        registry.get("bogus")


def test_every_prefix_leads_to_a_storage() -> None:
    assert set(registry.PREFIXES.values()) <= set(registry.STORAGES)
