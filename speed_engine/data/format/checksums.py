"""CRC-32 as zlib defines it, in a tenth of the time where zlib-ng is installed.

One place, so that all who write and verify members share it; ``doctor`` says which it is.
"""

try:
    from zlib_ng.zlib_ng import crc32
except ImportError:
    from zlib import crc32

__all__ = ["crc32"]
