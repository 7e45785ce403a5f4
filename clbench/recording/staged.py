"""Files that a fragment of wandb names by their whole paths, after its run directory was moved or copied.

wandb copies the file of a table into `wandb/artifacts/staging` and writes the path into the fragment's `.wandb` file.
Where nothing is at that path, `wandb beta sync` leaves the table out and says that all is sent.

A `.wandb` file has 7 bytes of its own, and then blocks of 32 KiB of chunks: CRC-32 of the rest without its length,
length, and kind (whole, first, middle or last of a record), then bytes of a record, which is wandb's protocol buffer.
No chunk begins in the last 6 bytes of a block.
"""

import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from clbench.recording.files import write_whole

_BEGIN = 7  # bytes before the first chunk, in the first block
_BLOCK = 32768
_HEAD = struct.Struct("<IHB")  # CRC-32, length, kind
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def find_again(fragment: Path) -> None:
    """Have a `.wandb` file name the files of tables where they are now: beside it, where they are not at their paths.

    Raises:
        UserError: the file is to be written anew, and cannot be.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    content = fragment.read_bytes()
    staging = fragment.parent.parent / "artifacts" / "staging"
    records, changed = [], False
    for record in _records(content):
        parsed = Record()
        parsed.ParseFromString(record)
        for entry in parsed.artifact.manifest.contents:
            here = staging / Path(entry.local_path).name
            if entry.local_path and not Path(entry.local_path).exists() and here.is_file():
                entry.local_path = str(here.absolute())
                record, changed = parsed.SerializeToString(), True
        records.append(record)
    if changed:
        write_whole(fragment, lambda path: path.write_bytes(content[:_BEGIN] + _chunks(records)))


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a `.wandb` file, up to one that is cut off or damaged."""
    at, record = _BEGIN, b""
    while at + _HEAD.size <= len(content):
        if _BLOCK - at % _BLOCK < _HEAD.size:
            at += _BLOCK - at % _BLOCK
            continue
        checksum, length, kind = _HEAD.unpack_from(content, at)
        at += _HEAD.size
        part = content[at : at + length]
        at += length
        if len(part) < length or zlib.crc32(bytes([kind]) + part) != checksum:
            return
        record = part if kind in (_WHOLE, _FIRST) else record + part
        if kind in (_WHOLE, _LAST):
            yield record


def _chunks(records: Iterable[bytes]) -> bytes:
    """Records as a `.wandb` file has them after its first bytes."""
    content = bytearray(_BEGIN)
    for record in records:
        begin = True
        while begin or record:
            room = _BLOCK - len(content) % _BLOCK
            if room < _HEAD.size:
                content += bytes(room)
                continue
            part, record = record[: room - _HEAD.size], record[room - _HEAD.size :]
            kind = (_FIRST if record else _WHOLE) if begin else (_MIDDLE if record else _LAST)
            content += _HEAD.pack(zlib.crc32(bytes([kind]) + part), len(part), kind) + part
            begin = False
    return bytes(content[_BEGIN:])
