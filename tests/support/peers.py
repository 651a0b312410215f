"""The real programs that tests compare with, and what happens where one is missing.

A test that needs one says so, by the marker ``@pytest.mark.peer("qemu-img", "qemu-io")`` or by asking for the
fixture of its name (``qemu_img``, ``qemu_io``, ``qemu_nbd``, ``nbdkit``, ``nbdcopy``). Where the program is
missing, the test skips with the reason ``needs qemu-img``; with QIMG_REQUIRE_PEERS=1 in the environment it
fails instead. The closing lines of the test run count what was skipped.
"""

from __future__ import annotations

import os
import shutil
from functools import cache

import pytest

#: Program -> the Debian package that brings it.
PACKAGES = {
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "nbdkit": "nbdkit",
    "nbdcopy": "libnbd-bin",
    "nbdinfo": "libnbd-bin",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "mkfs.btrfs": "btrfs-progs",
    "filefrag": "e2fsprogs",
    "lsattr": "e2fsprogs",
    "7z": "p7zip-full",
    "vmdkinfo": "libvmdk-utils",
    "qcowinfo": "libqcow-utils",
    "7zz": "7zip",
    "vhdiinfo": "libvhdi-utils",
    "mcopy": "mtools",
    "fsck.fat": "dosfstools",
    "cryptsetup": "cryptsetup-bin",
    "nginx": "nginx-light",
    "vsftpd": "vsftpd",
    "sshd": "openssh-server",
    "ssh-agent": "openssh-client",
    "openssl": "openssl",
    "tgtd": "tgt",
    "ganesha.nfsd": "nfs-ganesha",
    "rpcbind": "rpcbind",
    "ceph-mon": "ceph-mon",
    "ceph-osd": "ceph-osd",
    "ceph": "ceph-common",
}

SKIP_PREFIX = "needs "


def required() -> bool:
    """Whether a missing peer is a failure (QIMG_REQUIRE_PEERS)."""
    return os.environ.get("QIMG_REQUIRE_PEERS", "") not in ("", "0")


@cache
def find(program: str) -> str | None:
    """Path of a program; the administrator's folders count too, PATH of a plain user may lack them."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    return shutil.which(program, path=path)


def need(program: str) -> str:
    """Path of a peer. Skips the running test where it is missing, or fails it where peers are required."""
    path = find(program)
    if path is not None:
        return path
    reason = SKIP_PREFIX + program
    if required():
        package = PACKAGES.get(program)
        where = f" (Debian package {package})" if package else ""
        pytest.fail(f"{reason}{where}, and QIMG_REQUIRE_PEERS is set", pytrace=False)
    pytest.skip(reason)


@cache
def version(program: str = "qemu-img") -> tuple[int, ...]:
    """Version of a QEMU tool as numbers, (7, 2, 22) for example. Skips like `need`."""
    import re
    import subprocess

    text = subprocess.run([need(program), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+(?:\.\d+)+)", text)
    assert found is not None, text
    return tuple(int(part) for part in found.group(1).split("."))
