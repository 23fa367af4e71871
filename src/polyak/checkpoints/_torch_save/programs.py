"""The program of a pickle, checked instruction by instruction before Python's machine runs it.

Instructions that could take more memory than the file has bytes are refused. Dictionaries and sets are
made by calls of `persistent_load` instead, so that their keys can be checked.
"""

from __future__ import annotations

import re


def _sized(width: int) -> bytes:
    """A pattern for a length below 256, in this many bytes, and that many bytes of content."""
    rest = rb"\0" * (width - 1)
    return b"|".join(re.escape(bytes([n])) + rest + b".{%d}" % n for n in range(256))


# The instructions that pass unchanged; what they push or make is no larger than they are. Missing, and
# so refused: the text instructions of protocols 0 and 1 (PUT, INST, DICT, ...), OBJ, EXT, buffers.
_PLAIN = re.compile(
    rb"(?:[()012NQRabest\x81\x85-\x89\x93\x94\]u]|[Khq].|M..|[Jj].{4}|r..[\0-\3]\0|G.{8}|\x80[\0-\5]"
    rb"|[\x8c\x8aCU](?:" + _sized(1) + rb")|[XBT](?:" + _sized(4) + rb")"
    rb"|c[^\n]{0,500}\n[^\n]{0,500}\n){0,30000}",  # without an end, re would need memory for each
    re.DOTALL,
)
_REPLACED = {
    ord("}"): b"NQ",  # EMPTY_DICT: `persistent_load(None)`
    0x8F: b"\x88Q",  # EMPTY_SET: `persistent_load(True)`
    0x90: b"t\x86Q",  # ADDITEMS: `persistent_load((set, items))`
    0x91: b"tN\x86Q",  # FROZENSET: `persistent_load((items, None))`
    0x92: b"0\x81",  # NEWOBJ_EX: without the named arguments
}
_LENGTHS = {ord("X"): 4, ord("B"): 4, ord("T"): 4, 0x8B: 4, 0x8D: 8, 0x8E: 8, 0x96: 8}


_FRAME, _STOP, _LONG_BINPUT = 0x95, ord("."), ord("r")
_RESTS = (bytes(300), b"\n\n")  # they complete an instruction that the end of the data has cut


def checked(data: bytes, start: int) -> tuple[bytes, int]:
    """The program that begins at a place in the data, made harmless, and where it ends."""
    out, place = [], start
    while True:
        end = _PLAIN.match(data, place).end()  # type: ignore[union-attr]  # it matches nothing too
        out.append(data[place:end])
        if end >= len(data):
            raise EOFError("the pickle does not end")
        code = data[end]
        if code in _REPLACED:
            out.append(_REPLACED[code])
            place = end + 1
        elif code == _FRAME:  # lengths have changed: one frame for all is put in front
            place = end + 9
        elif code == _STOP:
            break
        else:
            place = _long_end(data, end) if place == end else end
            out.append(data[end:place])
    body = b"".join(out) + b"."
    return b"\x80\x04\x95" + len(body).to_bytes(8, "little") + body, end + 1


def _long_end(data: bytes, start: int) -> int:
    """Where an instruction ends whose content is long; raises for one that is not let through."""
    code = data[start]
    if code in _LENGTHS:
        content = start + 1 + _LENGTHS[code]
        end = content + int.from_bytes(data[start + 1 : content], "little")
    elif code == _LONG_BINPUT and int.from_bytes(data[start + 1 : start + 5], "little") <= start:
        end = start + 5  # the machine reserves memory up to this place
    elif any(_PLAIN.match(data[start:] + rest).end() for rest in _RESTS):  # type: ignore[union-attr]
        raise EOFError("the pickle does not end")
    else:
        raise ValueError(
            f"the pickle has the instruction {bytes([code])!r}, which polyak does not read"
        )
    if end > len(data):
        raise EOFError("the pickle does not end")
    return end
