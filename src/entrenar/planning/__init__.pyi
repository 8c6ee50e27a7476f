from entrenar.memory import MemoryLimit, memory_limit, parse_bytes, status_bytes
from entrenar.planning.advice import Advice, Change, advise
from entrenar.planning.ledger import Ledger
from entrenar.planning.machine import Rates, measure_rates, settle_compute_dtype
from entrenar.planning.ranks import RanksPlan
from entrenar.planning.rehearsal import Rehearsal, Scene, rehearse, take_step
from entrenar.planning.run_plan import RunPlan, batches_of, plan_run
from entrenar.planning.sizing import check_room, sized, sized_for_corpus
from entrenar.planning.step_plan import StepPlan, plan_step

__all__ = [
    "Advice",
    "Change",
    "Ledger",
    "MemoryLimit",
    "RanksPlan",
    "Rates",
    "Rehearsal",
    "RunPlan",
    "Scene",
    "StepPlan",
    "advise",
    "batches_of",
    "check_room",
    "measure_rates",
    "memory_limit",
    "parse_bytes",
    "plan_run",
    "plan_step",
    "rehearse",
    "settle_compute_dtype",
    "sized",
    "sized_for_corpus",
    "status_bytes",
    "take_step",
]
