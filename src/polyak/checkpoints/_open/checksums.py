"""Checksums: the CRC-32 of content whose parts are read in any order."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

_POLYNOMIAL = 0xEDB88320  # of CRC-32, bits reversed


def joined_checksum(pieces: Iterable[tuple[int, int]]) -> int:
    """The CRC-32 of pieces that follow each other, from the (CRC-32, length) of every piece.

    `crc(a + b) = crc(a) x^(8 len(b)) + crc(b)` over the polynomials of CRC-32.

    >>> a, b = b"some ", b"bytes"
    >>> joined_checksum([(zlib.crc32(a), 5), (zlib.crc32(b), 5)]) == zlib.crc32(a + b)
    True
    """
    joined = 0
    for crc, length in pieces:
        joined = (
            _times(_shift(length), joined) if joined else 0
        ) ^ crc  # most tensors are one piece
    return joined


@lru_cache(maxsize=64)
def _shift(length: int) -> int:
    """x^(8 length) modulo the polynomial; the highest bit is the coefficient of 1."""
    power, result = 1 << 23, 1 << 31
    while length:
        if length & 1:
            result = _times(power, result)
        power, length = _times(power, power), length >> 1
    return result


def _times(a: int, b: int) -> int:
    """The product of two polynomials modulo that of CRC-32."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product
