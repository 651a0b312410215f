"""The usage text. Scripts read its first lines, ``Command syntax:`` and ``Supported formats:``."""

from __future__ import annotations

from qimg.cli.main import COMMANDS, version_text
from qimg.formats import registry as formats
from qimg.storage import registry as storages

SYNTAX = {
    "amend": (
        "[--object objectdef] [--image-opts] [-p] [-q] [-f fmt] [-t cache] [--force] -o options filename"
    ),
    "bench": (
        "[-c count] [-d depth] [-f fmt] [--flush-interval=flush_interval] [-i aio] [-n] [--no-drain] "
        "[-o offset] [--pattern=pattern] [-q] [-s buffer_size] [-S step_size] [-t cache] [-w] [-U] filename"
    ),
    "bitmap": (
        "(--merge source | --add | --remove | --clear | --enable | --disable)... [-b source_file "
        "[-F source_fmt]] [-g granularity] [--object objectdef] [--image-opts | -f fmt] filename bitmap"
    ),
    "check": (
        "[--object objectdef] [--image-opts] [-q] [-f fmt] [--output=ofmt] [-r [leaks | all]] [-T src_cache] "
        "[-U] filename [filename2 [...]]"
    ),
    "commit": (
        "[--object objectdef] [--image-opts] [-q] [-f fmt] [-t cache] [-b base] [-r rate_limit] [-d] [-p] "
        "filename"
    ),
    "compare": (
        "[--object objectdef] [--image-opts] [-f fmt] [-F fmt] [-T src_cache] [-p] [-q] [-s] [-U] filename1 "
        "filename2"
    ),
    "convert": (
        "[--object objectdef] [--image-opts] [--target-image-opts] [--target-is-zero] [--bitmaps "
        "[--skip-broken-bitmaps]] [-U] [-C] [-c] [-p] [-q] [-n] [-f fmt] [-t cache] [-T src_cache] "
        "[-O output_fmt] [-B backing_file [-F backing_fmt]] [-o options] [-l snapshot_param] "
        "[-S sparse_size] [-r rate_limit] [-m num_coroutines] [-W] [--salvage] filename [filename2 [...]] "
        "output_filename"
    ),
    "create": (
        "[--object objectdef] [-q] [-f fmt] [-b backing_file [-F backing_fmt]] [-u] [-o options] filename "
        "[size]"
    ),
    "dd": (
        "[--object objectdef] [--image-opts] [-U] [-f fmt] [-O output_fmt] [bs=block_size] [count=blocks] "
        "[skip=blocks] if=input of=output"
    ),
    "info": (
        "[--object objectdef] [--image-opts] [-f fmt] [--output=ofmt] [--backing-chain] [-U] filename "
        "[filename2 [...]]"
    ),
    "map": (
        "[--object objectdef] [--image-opts] [-f fmt] [--start-offset=offset] [--max-length=len] "
        "[--output=ofmt] [-U] filename [filename2 [...]]"
    ),
    "measure": (
        "[--output=ofmt] [-O output_fmt] [-o options] [--size N | [--object objectdef] [--image-opts] "
        "[-f fmt] [-l snapshot_param] filename]"
    ),
    "rebase": (
        "[--object objectdef] [--image-opts] [-U] [-q] [-f fmt] [-t cache] [-T src_cache] [-p] [-u] [-c] "
        "-b backing_file [-F backing_fmt] filename"
    ),
    "resize": (
        "[--object objectdef] [--image-opts] [-f fmt] [--preallocation=prealloc] [-q] [--shrink] filename "
        "[+ | -]size"
    ),
    "snapshot": (
        "[--object objectdef] [--image-opts] [-U] [-q] [-l | -a snapshot | -c snapshot | -d snapshot] "
        "filename"
    ),
}

SUMMARIES = {
    "amend": "change options of creation in an image that exists",
    "bench": "measure how long requests to an image take",
    "bitmap": "change the persistent dirty bitmaps of an image, in the order of the options",
    "check": "look for corruptions and leaks inside an image",
    "commit": "write what an image holds into its backing file",
    "compare": "tell whether two images hold the same data",
    "convert": "copy images into a new image, or into one that exists",
    "create": "make a new, empty image",
    "dd": "copy a part of an image, counted in blocks, into a new image",
    "info": "describe an image",
    "map": "list which part of an image's data lies where",
    "measure": "predict the size of a new image file",
    "rebase": "change the backing file of an image",
    "resize": "change the size of the guest's disk",
    "snapshot": "list, create, apply or delete the snapshots inside an image",
}

#: What the options of one command mean: (option, sentence lines).
OPTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "amend": (
        ("-f fmt", "format of the image; found out if not given"),
        ("-o options", "what to change; '-o help' lists the options. What is not named stays as it is"),
        ("-t cache", "cache mode of the image"),
        ("-p, -q", "show progress; be quiet"),
        ("--force", "allow changes of keys that may lock everybody out"),
    ),
    "bench": (
        ("-c count", "requests in all (default 75000)"),
        ("-d depth", "requests at the same time (default 64)"),
        ("-f fmt", "format of the image; found out if not given"),
        ("--flush-interval", "flush after so many write requests"),
        ("-i aio", "threads, native or io_uring; native wants a cache mode without page cache"),
        ("-n", "the same as -i native"),
        ("--no-drain", "do not wait for the requests in flight before a flush"),
        ("-o offset", "where the first request begins, in bytes"),
        ("--pattern", "value of the bytes that are written (default 0)"),
        ("-s buffer_size", "bytes of a request (default 4k)"),
        ("-S step_size", "bytes from the beginning of a request to the next one's (default: buffer_size)"),
        ("-t cache", "cache mode of the image"),
        ("-w", "write, and so change the image; without it, read"),
        ("-q", "has no effect: the result is what is asked for"),
        ("-U, --force-share", "go ahead while another process writes to the image; not with -w"),
    ),
    "bitmap": (
        ("--add, --remove", "add a bitmap, which records from now on; remove it"),
        ("--clear", "set all its bits to clean"),
        ("--enable, --disable", "let it record changes, or not"),
        ("--merge source", "set the bits of another bitmap in it"),
        ("-b file, --source-file", "the image that merged bitmaps are in, if it is another one"),
        ("-F fmt, --source-format", "format of that image; found out if not given"),
        ("-g size, --granularity", "with --add: bytes of the disk that a bit stands for"),
        ("-f fmt", "format of the image; found out if not given"),
    ),
    "check": (
        ("-f fmt, --format", "format of the image; found out if not given"),
        ("-q", "print nothing but findings and errors"),
        ("-r leaks|all, --repair", "repair: only leaked clusters, or all that can be repaired"),
        ("-T src_cache", "cache mode of the image"),
        ("-U, --force-share", "go ahead while another process writes to the image"),
        ("--output", "human (default) or json"),
        ("exit code", "0 clean, 1 check failed, 2 corruptions, 3 leaks only, 63 no check for this format"),
    ),
    "commit": (
        ("-f fmt", "format of the image; found out if not given"),
        ("-b base", "commit into this image of the backing chain; filename keeps its content then"),
        ("-d", "do not empty filename afterwards"),
        ("-r rate_limit", "bytes a second at most"),
        ("-t cache", "cache mode of the images"),
        ("-p, -q", "show progress; be quiet"),
    ),
    "compare": (
        ("-f fmt, -F fmt", "formats of the first and the second image"),
        ("-p", "show progress"),
        ("-q", "print no verdict; the exit code tells it"),
        ("-s", "strict: sizes and allocation have to be equal as well"),
        ("-T src_cache", "cache mode of both images"),
        ("-U, --force-share", "go ahead while another process writes to an image"),
        ("exit code", "0 equal, 1 different, 2 cannot open, 3 no allocation data, 4 cannot read"),
    ),
    "convert": (
        ("-f fmt", "format of the source images; found out if not given"),
        ("-O output_fmt", "format of the new image; raw if not given"),
        ("-o options", "creation options of the new image; '-o help' lists them"),
        ("-c", "compress the data of the new image"),
        ("-n", "do not create: write into an image that exists and is large enough"),
        ("-B file, -F fmt", "backing file of the new image, and its format"),
        (
            "-l snapshot_param",
            "copy an internal snapshot: its id or name, or snapshot.id=ID,snapshot.name=NAME",
        ),
        ("-s snapshot", "older spelling of -l"),
        ("-S sparse_size", "blocks of zeros of this size become holes (default 4k); 0 writes everything"),
        ("-m num_coroutines", "requests in flight, 1 to 16 (default 8)"),
        ("-W", "write in any order"),
        ("-C", "let the kernel copy where it can"),
        ("-r rate_limit", "bytes a second at most"),
        ("-t cache, -T src_cache", "cache modes of the new image and of the sources"),
        ("--salvage", "replace unreadable sectors by zeros and go on"),
        ("--target-is-zero", "with -n: trust that the target reads as zeros"),
        ("--bitmaps", "copy the persistent bitmaps of the source's top image"),
        ("--skip-broken-bitmaps", "leave out bitmaps that are inconsistent"),
        ("--target-image-opts", "with -n: the target is an option string"),
        ("-p, -q", "show progress; be quiet"),
        ("-U, --force-share", "go ahead while another process writes to a source"),
    ),
    "create": (
        ("-f fmt", "format of the image; raw if not given"),
        ("-b file, -F fmt", "backing file and its format"),
        ("-u", "do not open the backing file, which may be missing; a size is needed then"),
        ("-o options", "creation options; '-o help' lists them"),
        ("-q", "do not say what is created"),
    ),
    "dd": (
        ("-f fmt", "format of the input; found out if not given"),
        ("-O output_fmt", "format of the output, which is always created anew; raw if not given"),
        ("bs=block_size", "bytes of a block (default 512)"),
        ("count=blocks", "look at so many blocks of the input only, those skipped among them"),
        ("skip=blocks", "leave out so many blocks at the beginning"),
        ("if=input, of=output", "the image to read, and the one to make"),
        ("-U, --force-share", "go ahead while another process writes to the input"),
    ),
    "info": (
        ("-f fmt, --format", "format of the image; found out if not given"),
        ("--backing-chain", "describe the backing files too"),
        ("--output", "human (default) or json"),
        ("-U, --force-share", "go ahead while another process writes to the image"),
    ),
    "map": (
        ("-f fmt, --format", "format of the image; found out if not given"),
        ("-s, --start-offset", "where to begin, in bytes"),
        ("-l, --max-length", "how much to list, in bytes"),
        ("--output", "human (default) or json; only json lists everything"),
        ("-U, --force-share", "go ahead while another process writes to the image"),
    ),
    "measure": (
        ("-O output_fmt", "format of the new image; raw if not given"),
        ("-o options", "creation options of the new image"),
        ("--size N", "size of the new image in bytes, instead of a source image"),
        ("-f fmt", "format of the source image; found out if not given"),
        ("-l snapshot_param", "measure an internal snapshot of the source image"),
        ("--output", "human (default) or json"),
    ),
    "rebase": (
        ("-f fmt", "format of the image; found out if not given"),
        ("-b file, -F fmt", "new backing file, '' for none, and its format"),
        ("-u", "change the name only, and compare nothing; without -b there is no backing file then"),
        ("-c, --compress", "compress the clusters that have to be written"),
        ("-t cache, -T src_cache", "cache modes of the image and of the new backing file"),
        ("-p, -q", "show progress; be quiet"),
        ("-U, --force-share", "go ahead while another process writes to the new backing file"),
    ),
    "resize": (
        ("[+ | -]size", "the last word: the new size in bytes, or how much larger or smaller"),
        ("-f fmt", "format of the image; found out if not given"),
        ("--preallocation", "how the added space is reserved: off, metadata, falloc or full"),
        ("--shrink", "confirm that the data behind the new end may be lost"),
        ("-q", "do not say that it is done"),
    ),
    "snapshot": (
        ("-l", "list the snapshots"),
        ("-c snapshot", "create a snapshot of that name of the disk as it is"),
        ("-a snapshot", "go back to the snapshot with that id, else with that name"),
        ("-d snapshot", "delete the first snapshot of that name"),
        ("-q", "has no effect: nothing is said on success"),
        ("-U, --force-share", "with -l: go ahead while another process writes to the image"),
    ),
}

_GLOBAL = """\
    '-h', '--help'       show this text
    '-V', '--version'    show the version
    '-T', '--trace'      [[enable=]<pattern>][,events=<file>][,file=<file>]
                         report events while working; '-T help' lists them
"""

_PARAMETERS = """\
Command parameters:
  'filename' is the name of an image: a file, PROTOCOL:..., json:{...}, or with
    --image-opts a list of key=value pairs
  'objectdef' describes a helper object such as a secret: TYPE,id=ID,key=value...;
    '--object help' lists the types
  'fmt' is the format of an image. Left out, it is found out from the image
  'cache' is the cache mode of what is written: none, writeback (the default but
    for convert), writethrough, directsync, unsafe (the default of convert)
  'src_cache' is the cache mode of what is read, one of the same words
  'size' is a size in bytes; a suffix k, M, G, T, P or E multiplies it by a power
    of 1024
  'options' is a list of key=value pairs, separated by commas; '-o help' shows
    what a format knows
  'snapshot_param' names an internal snapshot by its id or its name, or as
    'snapshot.id=[ID],snapshot.name=[NAME]'
  '-h' after a command shows the options of that command as well
  '-p' shows progress, '-q' leaves out everything but errors
  '--output' chooses between 'human' and 'json'
"""


def usage(name: str, command: str | None) -> str:
    """The whole text for the program called `name`; with `command`, that one's options come first."""
    syntax = "".join(f"  {known} {SYNTAX[known]}\n" for known in COMMANDS)
    return (
        f"{version_text(name)}"
        f"usage: {name} [standard options] command [command options]\n"
        "Disk images: create, convert, check and explain them\n\n"
        f"{_command(command)}"
        f"{_GLOBAL}\n"
        f"Command syntax:\n{syntax}\n"
        f"{_PARAMETERS}\n"
        f"Supported formats: {' '.join(sorted({*formats.supported(), *storages.supported()}))}\n\n"
        "See docs/ of the project for the manual, differences from qemu-img, and how to report a bug.\n"
    )


def _command(command: str | None) -> str:
    if command not in OPTIONS:
        return ""
    rows = "".join(f"    {option:<24} {text}\n" for option, text in OPTIONS[command])
    return f"{command}: {SUMMARIES[command]}\n{rows}\n"
