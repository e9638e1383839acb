"""Bytes in and out: exact reads and writes, atomic files, room on disk. Knows no tensors and no ranks."""
