"""CRC-32 as zlib defines it, several times faster where zlib-ng is installed.

One place, so that all who write and verify checksums share it.
"""

try:
    from zlib_ng.zlib_ng import crc32
except ImportError:
    from zlib import crc32

__all__ = ["crc32"]
