"""CRC-32 of bytes that were read in pieces and in any order.

A CRC is the remainder of a polynomial over GF(2). Appending n zero bytes multiplies it by x^(8n) modulo the CRC's
polynomial, so the CRC of A followed by B is ``crc(A) · x^(8·len(B)) xor crc(B)``, as in zlib's ``crc32_combine``.
"""

from __future__ import annotations

from functools import lru_cache

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31
"""The polynomial 1: bit 31 holds x^0, as the CRC is kept with its bits reversed."""


def _multiply(a: int, b: int) -> int:
    product = 0
    bit = _ONE
    while a:
        if a & bit:
            product ^= b
            a ^= bit
        bit >>= 1
        b = (b >> 1) ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


@lru_cache(maxsize=4096)
def _shift(length: int) -> int:
    """x^(8·length) modulo the polynomial. Cached: a reader's blocks have few lengths."""
    result = _ONE
    square = 1 << 23  # x^8
    while length:
        if length & 1:
            result = _multiply(square, result)
        square = _multiply(square, square)
        length >>= 1
    return result


def combine(first: int, second: int, length: int) -> int:
    """Return the CRC-32 of two runs of bytes after each other.

    Args:
        first: the CRC-32 of the first run.
        second: the CRC-32 of the second run.
        length: bytes in the second run.
    """
    return _multiply(_shift(length), first) ^ second
