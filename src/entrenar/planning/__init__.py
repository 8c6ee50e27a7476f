"""What a run takes before it is run."""

from entrenar.planning.ledger import Ledger
from entrenar.planning.machine import Rates, Room, measure_rates, parse_bytes, room, status_bytes
from entrenar.planning.planner import Plan, plan
from entrenar.planning.rehearsal import Rehearsal, Scene, go_through, rehearse

__all__ = [
    "Ledger",
    "Plan",
    "Rates",
    "Rehearsal",
    "Room",
    "Scene",
    "go_through",
    "measure_rates",
    "parse_bytes",
    "plan",
    "rehearse",
    "room",
    "status_bytes",
]
