"""`entrenar.data.corpus.shards`: ids go into files of bounded size, with their hashes."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entrenar.data.corpus.shards import ShardWriter
from entrenar.files import sha256_file


@pytest.mark.property
@pytest.mark.kills("data.corpus.shards", "self._stream.write(data)", "self._stream.write(data[::-1])")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.lists(st.integers(0, 12), max_size=5), st.integers(2, 10))
def test_shards_hold_the_ids_in_order_however_they_come(tmp_path: Path, lengths: list[int], shard_tokens: int):
    """All shards but the last are full, and together they are what was written."""
    writer = ShardWriter(tmp_path, "train", shard_tokens)
    parts = [np.arange(length, dtype="<u2") + 100 * number for number, length in enumerate(lengths)]
    for part in parts:
        writer.write(part)
    writer.close()
    shards = writer.entry().shards
    assert all(shard.tokens == shard_tokens for shard in shards[:-1])
    assert all(sha256_file(tmp_path / shard.file) == shard.sha256 for shard in shards)
    written = [np.fromfile(tmp_path / shard.file, dtype="<u2") for shard in shards]
    assert np.concatenate([*written, np.empty(0)]).tolist() == np.concatenate([*parts, np.empty(0)]).tolist()
    assert writer.entry().tokens == sum(lengths)
