"""Rows of a file are read when they are asked for, and no others."""

import numpy as np

from entrenar.interop.proof.readback import FileRows

TABLE = np.arange(40.0).reshape(8, 5)


def test_slices_and_lists_of_rows_are_those_of_the_whole():
    """And each read is of whole rows, in one span for a slice."""
    asked = []

    def read(start, stop):
        asked.append((start, stop))
        return TABLE.reshape(-1)[start:stop]

    rows = FileRows((8, 5), read)
    assert np.array_equal(rows[2:5], TABLE[2:5])
    assert asked == [(10, 25)]
    ids = np.array([[7, 0], [0, 3]])
    assert np.array_equal(rows[ids], TABLE[ids])
    assert np.array_equal(rows[:], TABLE)
    assert np.array_equal(FileRows((8,), lambda start, stop: np.arange(8.0)[start:stop])[3:], np.arange(3.0, 8.0))
