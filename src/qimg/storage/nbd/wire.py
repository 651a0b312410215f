"""What goes over the wire: the structures and numbers of the NBD protocol (proto.md of the NBD project).

All numbers are big-endian.
"""

from __future__ import annotations

from qimg.ondisk import Struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from qimg.ondisk import U16, U32, U64

# -- handshake

MAGIC = 0x4E42444D41474943  # NBDMAGIC
OLD_STYLE = 0x00420281861253
OPTION_MAGIC = 0x49484156454F5054  # IHAVEOPT
OPTION_REPLY_MAGIC = 0x0003E889045565A9

FIXED_NEWSTYLE, NO_ZEROES = 1, 2  # handshake flags, of both sides

OPT_EXPORT_NAME, OPT_ABORT, OPT_STARTTLS, OPT_GO = 1, 2, 5, 7
OPT_STRUCTURED_REPLY, OPT_SET_META_CONTEXT, OPT_EXTENDED_HEADERS = 8, 10, 11
OPTION_NAMES = {
    OPT_STARTTLS: "starttls",
    OPT_GO: "go",
    OPT_STRUCTURED_REPLY: "structured reply",
    OPT_SET_META_CONTEXT: "set meta context",
    OPT_EXTENDED_HEADERS: "extended headers",
}

REP_ACK, REP_INFO, REP_META_CONTEXT = 1, 3, 4
REP_ERROR = 1 << 31  # set in all errors
REP_ERR_UNSUP = REP_ERROR + 1
REP_ERR_POLICY = REP_ERROR + 2
REP_ERR_TLS_REQD = REP_ERROR + 5
REP_ERR_UNKNOWN = REP_ERROR + 6
REP_ERR_SHUTDOWN = REP_ERROR + 7
REP_ERR_BLOCK_SIZE_REQD = REP_ERROR + 8

INFO_EXPORT, INFO_BLOCK_SIZE = 0, 3


class Hello(Struct):
    """What a server begins with."""

    magic: U64
    style: U64


class OptionRequest(Struct):
    """One option; `length` bytes of data follow."""

    magic: U64
    option: U32
    length: U32


class OptionReply(Struct):
    """The answer to an option, or one of several; `length` bytes of data follow."""

    magic: U64
    option: U32
    kind: U32
    length: U32


class InfoExport(Struct):
    """Size in bytes and transmission flags of the export."""

    kind: U16
    size: U64
    flags: U16


class InfoBlockSize(Struct):
    """Sizes of requests, in bytes: all are multiples of `minimum`; none has more data than `maximum`."""

    kind: U16
    minimum: U32
    preferred: U32
    maximum: U32


class ExportName(Struct):
    """The answer to OPT_EXPORT_NAME, without its zeros."""

    size: U64
    flags: U16


# -- transmission flags

HAS_FLAGS = 1 << 0
READ_ONLY = 1 << 1
SEND_FLUSH = 1 << 2
SEND_FUA = 1 << 3
SEND_TRIM = 1 << 5
SEND_WRITE_ZEROES = 1 << 6
CAN_MULTI_CONN = 1 << 8
SEND_FAST_ZERO = 1 << 11

# -- requests

REQUEST_MAGIC = 0x25609513
EXTENDED_REQUEST_MAGIC = 0x21E41C71

CMD_READ, CMD_WRITE, CMD_DISC, CMD_FLUSH, CMD_TRIM = 0, 1, 2, 3, 4
CMD_WRITE_ZEROES, CMD_BLOCK_STATUS = 6, 7

FLAG_FUA = 1 << 0
FLAG_NO_HOLE = 1 << 1
FLAG_FAST_ZERO = 1 << 4
FLAG_PAYLOAD_LEN = 1 << 5


class Request(Struct):
    """A request; the data of a write follows."""

    magic: U32
    flags: U16
    command: U16
    cookie: U64
    offset: U64
    length: U32


class ExtendedRequest(Struct):
    """The same where extended headers were agreed on."""

    magic: U32
    flags: U16
    command: U16
    cookie: U64
    offset: U64
    length: U64


# -- replies

SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REPLY_MAGIC = 0x6E8A278C

REPLY_DONE = 1  # flag: the last chunk
CHUNK_NONE, CHUNK_DATA, CHUNK_HOLE, CHUNK_STATUS, CHUNK_STATUS_EXT = 0, 1, 2, 5, 6
CHUNK_IS_ERROR = 1 << 15  # set in the types of all errors


class SimpleReply(Struct):
    """A reply without chunks; the data of a read follows where `error` is 0."""

    magic: U32
    error: U32
    cookie: U64


class StructuredReply(Struct):
    """A chunk of a reply; `length` bytes follow."""

    magic: U32
    flags: U16
    kind: U16
    cookie: U64
    length: U32


class ExtendedReply(Struct):
    """The same where extended headers were agreed on."""

    magic: U32
    flags: U16
    kind: U16
    cookie: U64
    offset: U64
    length: U64


class HoleChunk(Struct):
    """`length` bytes from `offset` on are zeros."""

    offset: U64
    length: U32


class ErrorChunk(Struct):
    """`error`, and a text of `length` bytes for people."""

    error: U32
    length: U16


class StatusEntry(Struct):
    """The next `length` bytes and their flags, in the terms of the context."""

    length: U32
    flags: U32


class StatusEntryExt(Struct):
    """The same in a reply with extended headers."""

    length: U64
    flags: U64


class StatusHeadExt(Struct):
    """Before the entries of a reply with extended headers."""

    context: U32
    count: U32


# Flags of the context base:allocation.
STATE_HOLE, STATE_ZERO = 1, 2

#: Errors of the protocol, which are numbers of its own.
ERRORS = {
    1: "EPERM",
    5: "EIO",
    12: "ENOMEM",
    22: "EINVAL",
    28: "ENOSPC",
    75: "EOVERFLOW",
    95: "ENOTSUP",
    108: "ESHUTDOWN",
}

#: A client that wants to get along with every server keeps to these, in bytes.
DEFAULT_MINIMUM = 512
DEFAULT_MAXIMUM = 32 << 20
MAX_NAME = 4096
