"""Remember which documents were seen, in 16 to 32 bytes a document.

A set of Python integers takes about 70 bytes an entry; this is an open-addressing table of 64-bit hashes in one array
(Knuth, TAOCP vol. 3, 6.4, algorithm L), doubled at half load. Two different documents are taken for equal with
probability n²/2⁶⁵: 3 in a million for ten million documents.
"""

import hashlib
from array import array

_FIRST_SLOTS = 1 << 12


def document_hash(data: bytes) -> int:
    """Return 64 bits that name the content of a document."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


class SeenHashes:
    """A set of 64-bit hashes."""

    def __init__(self) -> None:
        self._slots = array("Q", bytes(8 * _FIRST_SLOTS))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def size_bytes(self) -> int:
        """Memory of the table."""
        return len(self._slots) * self._slots.itemsize

    def add(self, value: int) -> bool:
        """Add `value`; return whether it is new."""
        value = value or 1  # 0 marks a free slot
        if 2 * self._count >= len(self._slots):
            self._grow()
        at = self._find(self._slots, value)
        if self._slots[at] == value:
            return False
        self._slots[at] = value
        self._count += 1
        return True

    @staticmethod
    def _find(slots: "array[int]", value: int) -> int:
        mask = len(slots) - 1
        at = value & mask
        while slots[at] not in (0, value):
            at = (at + 1) & mask
        return at

    def _grow(self) -> None:
        larger = array("Q", bytes(16 * len(self._slots)))
        for value in self._slots:
            if value:
                larger[self._find(larger, value)] = value
        self._slots = larger
