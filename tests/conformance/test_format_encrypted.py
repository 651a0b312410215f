"""What `FormatSuite` asks of every format first of all, of encrypted images: the real program reads what we
write, of any size and shape. (The suite itself names images by file names, which cannot tell the key.)"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import qimg
from support import secrets
from support.run import run_real

pytestmark = pytest.mark.peer("qemu-img")

MIB = 1 << 20
SIZES = (0, 1, 513, 66048, 3 * MIB + 1000)
CONTEXT = secrets.context(warn=lambda _: None)
METHODS = {
    "aes": ("qcow2", secrets.AES),
    "luks": ("qcow2", f"{secrets.LUKS},encrypt.cipher-alg=aes-128"),
    "qcow": ("qcow", secrets.AES),
}
SHAPES = ("", "cluster_size=512", "cluster_size=2M", "extended_l2=on", "compat=0.10", "refcount_bits=1")
CASES = [(method, shape) for method in METHODS for shape in SHAPES if method != "qcow" or not shape]


@pytest.mark.parametrize(("method", "shape"), CASES)
def test_content_of_any_size_comes_out_of_the_real_program_as_it_went_in(
    method: str, shape: str, tmp_path: Path
) -> None:
    format, chosen = METHODS[method]
    options = dict(pair.split("=") for pair in f"{chosen},{shape}".split(",") if pair)
    for size in SIZES:
        if not size and format == "qcow":
            continue  # there are no such images
        source, path = tmp_path / f"source{size}", tmp_path / f"image{size}"
        third = size // 3
        source.write_bytes(os.urandom(third) + bytes(third) + os.urandom(size - 2 * third))
        qimg.convert(source, path, source_format="raw", format=format, options=options, context=CONTEXT)
        both = (secrets.options(path, format), f"driver=raw,file.filename={source}")
        assert run_real(["compare", *secrets.WORDS, "--image-opts", *both]).code == 0, size
        if format == "qcow2":
            run_real(["check", *secrets.words(path)]).ok()
        with qimg.open(secrets.where(path, format), context=CONTEXT) as disk:
            assert disk.read(0, size + 512)[:size] == source.read_bytes()


@pytest.mark.parametrize(("method", "shape"), CASES)
def test_a_new_image_reads_as_zeros(method: str, shape: str, tmp_path: Path) -> None:
    format, chosen = METHODS[method]
    options = dict(pair.split("=") for pair in f"{chosen},{shape}".split(",") if pair)
    zeros, path = tmp_path / "zeros", tmp_path / "image"
    zeros.write_bytes(bytes(70001))
    qimg.create(path, format=format, size=70001, options=options, context=CONTEXT)
    both = (secrets.options(path, format), f"driver=raw,file.filename={zeros}")
    run_real(["compare", *secrets.WORDS, "--image-opts", *both]).ok()
