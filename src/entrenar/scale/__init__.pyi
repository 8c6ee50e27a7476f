from entrenar.scale.agreement import check_same, check_shared, gather
from entrenar.scale.identity import weight_hashes
from entrenar.scale.ranks import current_world, joined, rank_log, watched

__all__ = [
    "check_same", "check_shared", "current_world", "gather", "joined", "rank_log", "watched", "weight_hashes",
]  # fmt: skip
