from entrenar.scale.agreement import check_same, check_shared, gather
from entrenar.scale.identity import weight_hashes
from entrenar.scale.link import Link, measure_link, measure_loopback, sent_bytes
from entrenar.scale.ranks import current_world, joined, rank_log, watched

__all__ = [
    "Link", "check_same", "check_shared", "current_world", "gather", "joined", "measure_link", "measure_loopback",
    "rank_log", "sent_bytes", "watched", "weight_hashes",
]  # fmt: skip
