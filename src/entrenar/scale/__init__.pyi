from entrenar.scale.agreement import check_same, check_shared, gather
from entrenar.scale.identity import weight_hashes
from entrenar.scale.link import Link, measure_link, measure_loopback, sent_bytes
from entrenar.scale.ranks import current_world, joined, rank_log, watched
from entrenar.scale.settings import ScaleConfig
from entrenar.scale.sharding import shard

__all__ = [
    "Link", "ScaleConfig", "check_same", "check_shared", "current_world", "gather", "joined", "measure_link",
    "measure_loopback", "rank_log", "sent_bytes", "shard", "watched", "weight_hashes",
]  # fmt: skip
