"""The tables of a run database, and the checksum of a row. docs/en/run-database.md explains them.

Every table but ``tally`` is append-only: ``seq`` counts its rows from 1, ``crc`` is the checksum of
the row. ``tally`` says how many rows each table has, so that a row that vanishes is noticed too,
and how many optimizer steps were done when something was written last.
"""

import struct
import zlib
from typing import TypeAlias

Value: TypeAlias = "int | float | str | bytes | None"

VERSION = 1
APPLICATION_ID = 0x4C524E52  # "LRNR", at byte 68 of the file
SUFFIX = ".db"
STEPS = "steps"  # the one name in ``tally`` that is no table's

COLUMNS = {
    "meta": ("key", "value"),
    "parameters": (
        "name",
        "names",
        "shape",
        "dtype",
        "device",
        "numel",
        "trainable",
        "policy",
    ),
    "observations": (
        "step",
        "time",
        "stage",
        "skipped",
        "scale",
        "every",
        "seconds",
        "rows",
        "numbers",
    ),
    "scalars": ("step", "time", "name", "value"),
    "alarms": ("step", "time", "kind", "severity", "name", "rank", "body"),
    "artifacts": ("step", "time", "name", "kind", "data"),
}

CREATE = """
CREATE TABLE meta (
  seq INTEGER PRIMARY KEY, key TEXT NOT NULL, value TEXT NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE parameters (
  seq INTEGER PRIMARY KEY, name TEXT NOT NULL, names TEXT NOT NULL, shape TEXT NOT NULL,
  dtype TEXT NOT NULL, device TEXT NOT NULL, numel INTEGER NOT NULL, trainable INTEGER NOT NULL,
  policy TEXT NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE observations (
  seq INTEGER PRIMARY KEY, step INTEGER NOT NULL, time REAL NOT NULL, stage TEXT NOT NULL,
  skipped INTEGER NOT NULL, scale REAL, every INTEGER NOT NULL, seconds REAL NOT NULL,
  rows BLOB NOT NULL, numbers BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE scalars (
  seq INTEGER PRIMARY KEY, step INTEGER NOT NULL, time REAL NOT NULL, name TEXT NOT NULL,
  value REAL, crc INTEGER NOT NULL);
CREATE TABLE alarms (
  seq INTEGER PRIMARY KEY, step INTEGER NOT NULL, time REAL NOT NULL, kind TEXT NOT NULL,
  severity TEXT NOT NULL, name TEXT NOT NULL, rank INTEGER, body TEXT NOT NULL,
  crc INTEGER NOT NULL);
CREATE TABLE artifacts (
  seq INTEGER PRIMARY KEY, step INTEGER NOT NULL, time REAL NOT NULL, name TEXT NOT NULL,
  kind TEXT NOT NULL, data BLOB NOT NULL, crc INTEGER NOT NULL);
CREATE TABLE tally (name TEXT PRIMARY KEY, rows INTEGER NOT NULL, crc INTEGER NOT NULL);
"""


def checksum(table: str, seq: int, values: tuple[Value, ...]) -> int:
    """CRC-32 over the table's name, the row's number, and each value with its type and length."""
    crc = zlib.crc32(f"{table}:{seq}".encode())
    for value in values:
        if value is None:
            kind, raw = b"n", b""
        elif isinstance(value, int):
            kind, raw = b"i", str(value).encode()
        elif isinstance(value, float):
            kind, raw = b"f", struct.pack("<d", value)
        elif isinstance(value, str):
            kind, raw = b"s", value.encode("utf-8", "surrogatepass")
        else:
            kind, raw = b"b", value
        crc = zlib.crc32(raw, zlib.crc32(kind + struct.pack("<Q", len(raw)), crc))
    return crc
