"""Whether SQLite's write-ahead log is whole: SQLite itself drops a damaged tail without a word.

The format is documented at https://sqlite.org/fileformat2.html#the_write_ahead_log: a header, then
frames of one page each, every frame with a checksum over all before it. SQLite reads up to the
first frame whose checksum is wrong; that is right for a writer that was killed, whose last frame is
torn, and hides a flipped bit in the middle together with everything after it.
"""

import struct
import time
from pathlib import Path

_HEADER, _FRAME = 32, 24
_MAGIC = 0x377F0682  # plus 1 where checksums are over big-endian words
_TORN = "the log ends in the middle of a write; what was written last may be missing"


def faults(path: Path) -> list[str]:
    """What is wrong with the log ``path``, in sentences; empty for a whole log or none.

    A log that changes while it is read belongs to a running writer, whose last frame may be half
    written; it is looked at again, and believed.
    """
    for _ in range(3):
        try:
            before = path.stat()
            found = _faults(path.read_bytes())
        except FileNotFoundError:
            return []
        if not found:
            return []
        time.sleep(0.1)
        if not path.exists():
            return []
        after = path.stat()
        if (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns):
            return [f"{path.name}: {fault}" for fault in found]
    return []


def _faults(raw: bytes) -> list[str]:
    if not raw:
        return []
    if len(raw) < _HEADER:
        return ["the log ends in the middle of its header"]
    magic, _version, size, restarts, salt, other, *want = struct.unpack(">8I", raw[:_HEADER])
    order = ">" if magic == _MAGIC + 1 else "<"
    sums = _checksum(raw[:24], order, (0, 0))
    if magic & ~1 != _MAGIC or sums != tuple(want):
        return ["the header of the log fails its checksum; what was written last is missing"]
    length = _FRAME + size
    number = (len(raw) - _HEADER) // length
    salts = [struct.unpack_from(">2I", raw, _HEADER + i * length + 8) for i in range(number)]

    def earlier(of: int) -> bool:
        return bool(0 < (salt - of) % 2**32 <= restarts)

    for i in range(number):
        at = _HEADER + i * length
        if salts[i] == (salt, other):
            sums = _checksum(raw[at : at + 8], order, sums)
            sums = _checksum(raw[at + _FRAME : at + length], order, sums)
            if sums == struct.unpack_from(">2I", raw, at + 16):
                continue
            if i + 1 < number and all(earlier(old) for old, _ in salts[i + 1 :]):
                return [_TORN]  # half of a frame over one of an earlier turn
        elif (salt, other) not in salts[i:] and earlier(salts[i][0]):
            return []  # what is left of an earlier turn of the log
        lost = number - i
        return [f"frame {i + 1} of the log is damaged; the last {lost} pages written are missing"]
    if (len(raw) - _HEADER) % length:
        return [_TORN]
    return []


def _checksum(data: bytes, order: str, sums: tuple[int, int]) -> tuple[int, int]:
    one, two = sums
    for x, y in struct.iter_unpack(order + "2I", data):
        one = (one + x + two) & 0xFFFFFFFF
        two = (two + y + one) & 0xFFFFFFFF
    return one, two
