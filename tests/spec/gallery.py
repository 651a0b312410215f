"""A folder of images for the reading commands: every feature of qcow2 and raw, made by the real programs.

`SCRIPT` makes them, one line a step; `patch` puts in by hand what no program writes. Names tell what is special.
"""

# ruff: noqa: E501  (a line is a step)
from __future__ import annotations

import hashlib
import os
import struct
import subprocess
from pathlib import Path

from support import peers

#: `new NAME SIZE OPTIONS...` makes a qcow2 image, `io NAME COMMAND...` changes it through qemu-io.
SCRIPT = r"""
set -e
io() { local name=$1; shift; local args=(); for c in "$@"; do args+=(-c "$c"); done
       qemu-io -t unsafe -f qcow2 "${args[@]}" "$name" > io.log 2>&1 || { cat io.log >&2; exit 1; }; }
rawio() { local name=$1; shift; local args=(); for c in "$@"; do args+=(-c "$c"); done
       qemu-io -t unsafe -f raw "${args[@]}" "$name" > io.log; }
new() { local name=$1 size=$2; shift 2; qemu-img create -q -f qcow2 "$@" "$name" "$size"; }
crash() { (ulimit -c 0; qemu-io -f qcow2 -c "$2" -c 'sigraise 9' "$1" >/dev/null 2>&1) || true; }

# -- raw
truncate -s 0 empty.raw
truncate -s 1M hole.raw
printf xyz > 3.raw
printf xyzw > 4.raw
head -c 1000 /dev/zero > 1000.raw
head -c 1500 /dev/zero > 1500.raw
truncate -s 70001 odd.raw; printf Z | dd of=odd.raw bs=1 seek=70000 conv=notrunc status=none
qemu-img create -q -f raw holes.raw 3M
rawio holes.raw 'write -P 1 64k 4k' 'write -P 2 128k 128k' 'write -P 0 1M 64k' 'write -P 3 2M 512'
truncate -s 1M full.raw; rawio full.raw 'write -P 7 0 1M'
cp full.raw full2.raw; printf x | dd of=full2.raw bs=1 seek=70001 conv=notrunc status=none
truncate -s 2M long.raw; rawio long.raw 'write -P 7 0 1M'
truncate -s 3M ld.raw; rawio ld.raw 'write -P 7 0 1M' 'write -P 1 2500k 512'
qemu-img create -q -f raw -o preallocation=falloc falloc.raw 1M
qemu-img create -q -f raw -o preallocation=full zeros.raw 1M
mkdir dir
mkfifo fifo
ln -s holes.raw link.raw
ln -s nowhere dangling.raw
cp full.raw 'co:lon.raw'
cp full.raw 'com,ma.raw'
cp full.raw $'new\nline.raw'
cp full.raw 'spa ce.raw'
cp full.raw 'ümlaut.raw'
cp full.raw $'bad\xff.raw'

# -- qcow2: plain features
new empty.q 1M
new zero.q 0
new odd.q 70001
new sector.q 512
new data.q 1M;      io data.q 'write -P 7 0 1M'
new a.q 1M;         io a.q 'write -P 1 64k 64k' 'write -P 2 256k 192k' 'write -P 3 1M 0'
new scattered.q 1M; io scattered.q 'write -P 1 192k 64k' 'write -P 2 128k 64k' 'write -P 3 64k 64k' 'write -P 4 512k 1k'
new v2.q 4M -o compat=0.10; io v2.q 'write -P 1 0 64k' 'write -P 2 1M 100k'
new v2c.q 1M -o compat=0.10; io v2c.q 'write -c -P 1 0 64k' 'write -c -P 2 64k 64k'
new v2z.q 1M -o compat=0.10; io v2z.q 'write -P 1 0 256k' 'write -z 64k 64k' 'discard 128k 64k'
for b in 1 2 4 8 16 32 64; do new rb$b.q 1M -o refcount_bits=$b; io rb$b.q 'write -P 1 128k 128k'; done
for c in 512 1k 2k 4k 8k 16k 32k 128k 256k 512k 1M 2M; do new cs$c.q 5M -o cluster_size=$c; io cs$c.q 'write -P 1 1000k 3000k' 'write -z 2M 100k'; done
new zeros.q 1M;     io zeros.q 'write -P 1 0 512k' 'write -z 64k 64k' 'write -z -u 192k 64k' 'write -z 640k 64k' 'discard 320k 64k'
new onezero.q 1M;   io onezero.q 'write -z 64k 64k'
new half.q 1M;      io half.q 'write -P 1 0 64k' 'write -z 32k 32k' 'write -z 10k 1k'
new big.q 10G;      io big.q 'write -P 1 0 64k' 'write -P 2 5G 1M' 'write -P 3 10239M 1M'
new huge.q 4T -o cluster_size=2M; io huge.q 'write -P 1 3T 1M'
new zlib.q 1M;      io zlib.q 'write -c -P 1 0 64k' 'write -c -P 2 64k 64k' 'write -P 3 256k 64k' 'write -c -P 4 512k 64k'
new zstd.q 1M -o compression_type=zstd; io zstd.q 'write -c -P 1 0 64k' 'write -c -P 2 64k 64k' 'write -P 3 256k 64k'
qemu-img convert -c -O qcow2 holes.raw packed.q
qemu-img convert -c -O qcow2 -o compression_type=zstd,cluster_size=4k full.raw packed4k.q
new lazy.q 1M -o lazy_refcounts=on; io lazy.q 'write -P 1 0 64k'
new dirty.q 1M -o lazy_refcounts=on; crash dirty.q 'write -P 1 0 128k'
new meta.q 4M -o preallocation=metadata
new meta2.q 4M -o preallocation=metadata; io meta2.q 'write -P 1 128k 128k' 'write -P 2 1M 512'
new metafalloc.q 4M -o preallocation=falloc
new metafull.q 1M -o preallocation=full
new metaext.q 4M -o preallocation=metadata,extended_l2=on
new metav2.q 4M -o preallocation=metadata,compat=0.10

# -- extended L2
new ext.q 1M -o extended_l2=on
io ext.q 'write -P 1 0 2k' 'write -P 2 6k 2k' 'write -P 3 64k 64k' 'write -z 128k 4k' 'write -P 5 200k 1k' 'write -z 64k 8k' 'discard 96k 4k' 'write -z 256k 64k' 'write -c -P 9 320k 64k'
new ext16k.q 1M -o extended_l2=on,cluster_size=16k; io ext16k.q 'write -P 1 1k 3k' 'write -z 32k 512' 'write -P 2 100k 50k'
new ext2m.q 9M -o extended_l2=on,cluster_size=2M; io ext2m.q 'write -P 1 1M 64k' 'write -z 3M 128k' 'write -P 2 5M 3M'
new extfull.q 1M -o extended_l2=on; io extfull.q 'write -P 7 0 1M'
new extgone.q 1M -o extended_l2=on; io extgone.q 'write -P 7 0 128k' 'discard 0 64k' 'write -P 1 66k 2k' 'discard 80k 2k'

# -- external data files
new df.q 1M -o data_file=df.data; io df.q 'write -P 1 64k 64k' 'write -z 192k 64k' 'write -P 2 512k 64k' 'discard 512k 64k'
new dfraw.q 1M -o data_file=dfraw.data,data_file_raw=on; io dfraw.q 'write -P 1 64k 64k' 'write -z 192k 64k'
new dfext.q 1M -o data_file=dfext.data,extended_l2=on; io dfext.q 'write -P 1 66k 2k' 'write -z 192k 4k'
new dfmeta.q 1M -o data_file=dfmeta.data,preallocation=metadata
new dfzero.q 1M -o data_file=dfzero.data; io dfzero.q 'write -P 1 0 64k'
new dfgone.q 1M -o data_file=dfgone.data; rm dfgone.data
mkdir -p sub
(cd sub; qemu-img create -q -f qcow2 -o data_file=dfrel.data dfrel.q 1M; qemu-io -f qcow2 -c 'write -q -P 1 0 64k' dfrel.q)

# -- internal snapshots and bitmaps
new snap.q 1M; io snap.q 'write -P 1 0 128k'; qemu-img snapshot -c one snap.q
io snap.q 'write -P 2 64k 128k'; qemu-img snapshot -c 'two words' snap.q; io snap.q 'write -c -P 3 512k 64k' 'discard 0 64k'
new snapext.q 1M -o extended_l2=on; io snapext.q 'write -P 1 0 4k'; qemu-img snapshot -c s snapext.q; io snapext.q 'write -P 2 2k 4k'
new snapv2.q 1M -o compat=0.10; qemu-img snapshot -c s snapv2.q; qemu-img snapshot -c ümlaut-and-a-name-longer-than-16 snapv2.q
new bitmaps.q 10M
qemu-img bitmap --add bitmaps.q b0; qemu-img bitmap --add --disable bitmaps.q b1; qemu-img bitmap --add -g 32k bitmaps.q b2
io bitmaps.q 'write -P 1 0 64k' 'write -P 2 5M 1M'
new bitmaps2.q 1M; qemu-img bitmap --add bitmaps2.q b0; io bitmaps2.q 'write -P 1 0 64k'; crash bitmaps2.q 'write -P 1 128k 128k'

# -- backing chains
new base.q 1M; io base.q 'write -P 1 0 128k' 'write -P 2 512k 64k' 'write -c -P 3 640k 64k' 'write -z 256k 64k'
new ov.q 1M -b base.q -F qcow2; io ov.q 'write -P 5 64k 64k' 'write -z 512k 64k' 'discard 128k 64k'
new long.q 2M -b base.q -F qcow2; io long.q 'write -P 5 1M 64k' 'write -z 640k 64k'
new short.q 500k -b base.q -F qcow2; io short.q 'write -P 5 128k 64k'
new longer.q 3M -b long.q -F qcow2
new onraw.q 1M -b full.raw -F raw; io onraw.q 'write -P 5 64k 64k'
new onholes.q 4M -b holes.raw -F raw; io onholes.q 'write -z 128k 64k' 'write -P 1 3M 64k'
new onodd.q 128k -b odd.raw -F raw
new onempty.q 1M -b empty.raw -F raw
new onzero.q 1M -b zero.q -F qcow2
new ext-ov.q 1M -b base.q -F qcow2 -o extended_l2=on; io ext-ov.q 'write -P 5 2k 2k' 'write -z 70k 2k' 'write -P 6 640k 2k'
new ext-ov2.q 1M -b ext-ov.q -F qcow2; io ext-ov2.q 'write -P 5 128k 64k'
new df-ov.q 2M -b df.q -F qcow2 -o data_file=df-ov.data; io df-ov.q 'write -P 5 0 64k'
new abs.q 1M -u -b "$FINAL/base.q" -F qcow2
new json.q 1M -b 'json:{"driver":"qcow2","file":{"driver":"file","filename":"base.q"}}' -F qcow2
new jsonplain.q 1M -b "json:{'file.filename':'full.raw','driver':'raw'}" -F raw
new jsonwindow.q 512k -b "json:{'file.filename':'holes.raw','driver':'raw','offset':65536,'size':262144}" -F raw
new proto.q 1M -b file:base.q -F qcow2
new gone.q 1M -u -b nosuch.q -F qcow2
new gonedeep.q 1M -u -b gone.q -F qcow2
new wrongformat.q 1M -u -b full.raw -F qcow2
cp wrongformat.q unknownformat.q
new unknownproto.q 1M -u -b nosuch:x -F raw
new jsongone.q 1M -u -b 'json:{"driver":"qcow2","file":{"driver":"file","filename":"nosuch.q"}}' -F qcow2
new jsonbad.q 1M -u -b 'json:{"driver":' -F qcow2
new loop1.q 1M -u -b loop2.q -F qcow2
new loop2.q 1M -u -b loop1.q -F qcow2
new loop3.q 1M -u -b loop4.q -F qcow2; mv loop3.q loop4.q
(cd sub; qemu-img create -q -f qcow2 -b ../base.q -F qcow2 rel.q; qemu-img create -q -f qcow2 -b rel.q -F qcow2 rel2.q; qemu-img create -q -f qcow2 -u -b missing.q -F qcow2 gone.q 1M
 qemu-io -f qcow2 -c 'write -q -P 6 0 64k' rel.q)
ln -s sub/rel2.q link.q
new chain0.q 1M; io chain0.q 'write -P 1 0 1M'
for i in 1 2 3 4 5 6 7 8 9 10 11 12; do new chain$i.q 1M -b chain$((i-1)).q -F qcow2; io chain$i.q "write -P $i $((i*64))k 64k"; done
qemu-img convert -O qcow2 ov.q flat.q
qemu-img convert -O raw ov.q flat.raw
qemu-img convert -O qcow2 -o cluster_size=4k data.q data4k.q
new reversed.q 1M; io reversed.q 'write -P 7 512k 512k' 'write -P 7 0 512k'
qemu-img convert -O qcow2 a.q nested.img
qemu-img convert -f raw -O qcow2 nested.img nested.q

# -- copies for what is patched in
for name in corrupt extension compatible autoclear incompatible incompatible2 incompatiblenamed nofmt version4 cluster8 rb7 cryptbad aes \
    l1far l1odd magic compressiontype headerlength ; do cp a.q p-$name.q; done
for name in leak low lost copied uncopied misaligned l2far l2odd reserved l1reserved dataodd refblock reftable double beyond truncated; do cp a.q c-$name.q; done
cp zlib.q c-zcopied.q; cp zlib.q c-zlow.q; cp zlib.q c-zbeyond.q; cp zlib.q c-garbage.q; cp zstd.q c-zgarbage.q
cp snap.q c-snaplow.q; cp snap.q c-snapbad.q; cp ext.q c-extbad.q; cp v2z.q c-v2zero.q; cp df.q c-df.q; cp bitmaps.q c-bitmap.q; cp rb1.q c-rb1.q; cp rb64.q c-rb64.q
cp snapv2.q snapclock.q
cp dirty.q c-dirty.q
new c-back.q 1M -b c-misaligned.q -F qcow2
for n in 3 20 71 72 100 104 500 65536 200000 262145; do head -c $n a.q > t-$n.q; done
rm -f io.log
"""


def u64(path: Path, offset: int) -> int:
    """The big-endian number at `offset`."""
    return struct.unpack(">Q", path.read_bytes()[offset : offset + 8])[0]


def patch(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def q(number: int) -> bytes:
    """A big-endian 64-bit number."""
    return struct.pack(">Q", number)


def tables(path: Path) -> tuple[int, int]:
    """Offsets of the L1 table and of its first L2 table."""
    l1 = u64(path, 40)
    return l1, u64(path, l1) & 0x00FFFFFFFFFFFE00


def refblock(path: Path) -> tuple[int, int]:
    """Offsets of the refcount table and of its first block."""
    table = u64(path, 48)
    return table, u64(path, table)


def _patch_headers(folder: Path) -> None:
    def header(name: str, offset: int, data: bytes) -> None:
        patch(folder / f"p-{name}.q", offset, data)

    header("corrupt", 72, q(2))
    header("compatible", 80, q(1 << 40 | 1))
    header("autoclear", 88, q(1 << 5))
    header("incompatible", 72, q(1 << 16))
    header("incompatible2", 72, q(1 << 40 | 1 << 16))
    header("incompatiblenamed", 72, q(1 << 40))
    header("version4", 4, struct.pack(">I", 4))
    header("cluster8", 20, struct.pack(">I", 8))
    header("rb7", 96, struct.pack(">I", 7))
    header("cryptbad", 32, struct.pack(">I", 3))
    header("aes", 32, struct.pack(">I", 1))
    header("l1far", 40, q(1 << 62))
    header("l1odd", 40, q(0x30001))
    header("magic", 0, b"QFI\xfa")
    header("headerlength", 100, struct.pack(">I", 103))
    header("compressiontype", 104, b"\x07")
    # After the header comes the feature name table, then the end mark.
    path = folder / "p-extension.q"
    data = bytearray(path.read_bytes())
    kind, length = struct.unpack_from(">II", data, 112)
    assert kind == 0x6803F857
    end = 112 + 8 + -(-length // 8) * 8
    data[end : end + 40] = struct.pack(">II", 0x12345678, 21) + b"unknown to all of us." + bytes(11)
    path.write_bytes(data)
    path = folder / "p-incompatiblenamed.q"
    data = bytearray(path.read_bytes())
    data[120:122] = bytes((0, 40))
    data[122:168] = b"a feature from the future".ljust(46, b"\0")
    path.write_bytes(data)
    path = folder / "unknownformat.q"
    path.write_bytes(path.read_bytes().replace(b"qcow2\0\0\0", b"wrong\0\0\0", 1))
    # An image without its backing format: the extension becomes one that nobody knows.
    path = folder / "p-nofmt.q"
    data = bytearray((folder / "ov.q").read_bytes())
    at = data.index(struct.pack(">I", 0xE2792ACA))
    data[at : at + 4] = struct.pack(">I", 0x7A7A7A7A)
    path.write_bytes(data)


def _patch_tables(folder: Path) -> None:
    def of(name: str) -> tuple[Path, int, int, int, int]:
        path = folder / f"c-{name}.q"
        return path, *tables(path), *refblock(path)

    cluster = 65536
    path, l1, l2, table, block = of("leak")
    count = path.stat().st_size // cluster
    os.truncate(path, (count + 1) * cluster)
    patch(path, block + 2 * count, b"\0\1")
    path, l1, l2, table, block = of("double")
    patch(path, block + 2 * 5, b"\0\3")
    path, l1, l2, table, block = of("lost")
    patch(path, block + 2 * 5, b"\0\0")
    path, l1, l2, table, block = of("low")
    entry = u64(path, l2 + 8)
    patch(path, l2 + 8 * 9, q(entry & ~(1 << 63)))
    path, l1, l2, table, block = of("copied")
    patch(path, l2 + 8, q(u64(path, l2 + 8) & ~(1 << 63)))
    path, l1, l2, table, block = of("uncopied")
    patch(path, l1, q(u64(path, l1) & ~(1 << 63)))
    for name in ("misaligned", "dataodd"):
        path, l1, l2, table, block = of(name)
        patch(path, l2 + 8 * (1 if name == "misaligned" else 5), q(u64(path, l2 + 8) + 0x200))
    path, l1, l2, table, block = of("l2far")
    patch(path, l1, q(1 << 63 | 1 << 40))
    path, l1, l2, table, block = of("l2odd")
    patch(path, l1, q(u64(path, l1) + 0x200))
    path, l1, l2, table, block = of("reserved")
    patch(path, l2 + 8 * 10, q(1 << 63 | 0x0101010101010100 | 0x50000))
    path, l1, l2, table, block = of("l1reserved")
    patch(path, l1, q(u64(path, l1) | 0x0F))
    path, l1, l2, table, block = of("refblock")
    patch(path, table, q(block + 0x200))
    path, l1, l2, table, block = of("reftable")
    patch(path, table + 8, q(1 << 41))
    path, l1, l2, table, block = of("beyond")
    patch(path, l2 + 8 * 12, q(1 << 63 | 1 << 40))
    path, l1, l2, table, block = of("truncated")
    os.truncate(path, path.stat().st_size - 2 * cluster)
    path, l1, l2, table, block = of("zcopied")
    patch(path, l2, q(u64(path, l2) | 1 << 63))
    path, l1, l2, table, block = of("zlow")
    patch(path, l2 + 8 * 10, q(u64(path, l2)))
    path, l1, l2, table, block = of("zbeyond")
    patch(path, l2 + 8 * 10, q(1 << 62 | 1 << 40))
    path, l1, l2, table, block = of("garbage")
    patch(path, u64(path, l2) & 0x3FFFFFFFFFFFFF, b"\xff\xff\xff\xff")
    path, l1, l2, table, block = of("zgarbage")
    patch(path, u64(path, l2) & 0x3FFFFFFFFFFFFF, b"\xff\xff\xff\xff")
    path, l1, l2, table, block = of("snaplow")
    patch(path, block + 2 * 5, b"\0\1")
    path, l1, l2, table, block = of("snapbad")
    patch(path, u64(path, 64), q(0x30200))
    path, l1, l2, table, block = of("extbad")
    patch(path, l2 + 8, q(0x100000001 | u64(path, l2 + 8)))
    path, l1, l2, table, block = of("v2zero")
    patch(path, l2 + 8 * 10, q(1))
    path, l1, l2, table, block = of("df")
    patch(path, l2 + 8 * 10, q(1 << 62 | 0x50000))
    path, l1, l2, table, block = of("rb1")
    patch(path, block, b"\x0f")
    path, l1, l2, table, block = of("rb64")
    patch(path, block + 8 * 4, q(1 << 63))
    path, l1, l2, table, block = of("bitmap")
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack(">I", 0x23852875))
    directory = struct.unpack_from(">Q", data, at + 24)[0]
    data[directory : directory + 8] = q(0x10200)
    path.write_bytes(data)
    path, l1, l2, table, block = of("dirty")
    patch(path, block + 2 * 4, b"\0\2")
    # A snapshot with a guest's clock, memory and instruction count (v2 has no room but takes 24 extra bytes).
    path = folder / "snapclock.q"
    at = u64(path, 64)
    patch(path, at + 20, struct.pack(">QI", 123_456_789_012_345, 5 << 20))


def build(folder: Path, final: Path | None = None) -> None:
    """Make all images in the empty `folder`, which will be called `final` (one of them says so)."""
    for program in ("qemu-img", "qemu-io"):
        peers.need(program)
    env = {**os.environ, "LC_ALL": "C.UTF-8", "FINAL": str(final or folder)}
    done = subprocess.run(
        ["bash", "-c", SCRIPT], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    _patch_headers(folder)
    _patch_tables(folder)
    # Space that the file system has only promised would change `disk size` under the tests.
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def digest(folder: Path) -> dict[str, str]:
    """A fingerprint of every file, to see what a command changed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            status = path.stat()
            # Sparse giants are told apart by time and length alone.
            data = path.read_bytes() if status.st_size < 8 << 20 else b""
            found[str(path)] = f"{status.st_size} {status.st_mtime_ns} {hashlib.sha256(data).hexdigest()}"
    return found
