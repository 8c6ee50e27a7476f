"""`entrenar doctor RUN`: what happened to a run, which checkpoints are whole, what to do next; without torch.

Every byte of every checkpoint is checked against its manifest, and nothing is changed.
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from entrenar.cli.next_step import generate_command, resume_command
from entrenar.errors import CheckpointError, EntrenarError
from entrenar.files import TEMPORARY_PREFIX
from entrenar.locks import is_held
from entrenar.report import Finding, findings, read_history
from entrenar.report.overview import Overview, describe
from entrenar.runs import ROUTINE_EVENTS, Event, RunFolder, checkpoint_name, list_checkpoints
from entrenar.train.manifest import faults_of_files, read_manifest

_EVENTS_SHOWN, _PLACES_SHOWN = 12, 5
_ELSEWHERE = (*ROUTINE_EVENTS, "bundle_written")  # checkpoints and bundles have their own places on the page


@dataclass(frozen=True)
class Saved:
    """A checkpoint; `fault` says why nobody can resume from it."""

    step: int
    size_bytes: int
    held_out_loss: float | None
    fault: str | None


@dataclass(frozen=True)
class Examination:
    """The findings about a run's folder.

    Attributes:
        holder: the process that trains there now, if it is known.
        events: what a person should know, the newest last; `num_events` is how many there are.
        apart: states that no resume takes: diverged, set aside, or begun and never finished.
        bundles: steps that can be taken again.
        next: what to do, each with its command.
    """

    overview: Overview
    is_live: bool
    holder: int | None
    events: Sequence[Event]
    num_events: int
    checkpoints: Sequence[Saved]
    apart: Sequence[str]
    bundles: Sequence[str]
    findings: Sequence[Finding]
    next: Sequence[tuple[str, str]]

    @property
    def newest_good(self) -> Saved | None:
        """The checkpoint that a resume takes."""
        return next((one for one in reversed(self.checkpoints) if one.fault is None), None)


def show(folder: Path, *, as_json: bool) -> int:
    """Print what is found; return 0, or 2 if there are checkpoints and none of them is whole."""
    found = examine(folder)
    print(json.dumps(asdict(found), indent=1) if as_json else "\n".join(_lines(folder, found)))
    return 2 if found.checkpoints and found.newest_good is None else 0


def examine(folder: Path) -> Examination:
    """Look at everything in a run's folder."""
    run = RunFolder(folder)
    overview, is_live = describe(folder), is_held(run.lock)
    events: list[Event] = []
    with suppress(EntrenarError, OSError):
        events = [event for event in run.read_events() if event.kind not in _ELSEWHERE]
    found: list[Finding] = []
    with suppress(EntrenarError, OSError, ValueError):
        named = {event.kind.replace("_", " ").capitalize() + "." for event in events}
        found = [finding for finding in findings(read_history(folder)) if finding.what not in named]
    checkpoints = [_saved(step, path) for step, path in list_checkpoints(run.checkpoints).items()]
    bundles = sorted(str(path) for path in run.replay.glob("*.json"))
    return Examination(
        overview=overview,
        is_live=is_live,
        holder=_holder(run.lock) if is_live else None,
        events=events[-_EVENTS_SHOWN:],
        num_events=len(events),
        checkpoints=checkpoints,
        apart=list(_apart(run)),
        bundles=bundles,
        findings=found,
        next=list(_next(folder, overview, checkpoints, bundles, is_live=is_live)),
    )


def _saved(step: int, path: Path) -> Saved:
    try:
        manifest = read_manifest(path)
        faults = faults_of_files(path, manifest)
        if not faults and path.name != checkpoint_name(manifest["step"]):
            faults = [f"it holds step {manifest['step']}: a copy under another name"]
        size = sum(entry["size"] for entry in manifest["files"].values())
        return Saved(step, size, manifest["held_out_loss"], "; ".join(faults) or None)
    except (CheckpointError, OSError) as error:
        return Saved(step, 0, None, str(error))


def _holder(lock: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(lock.read_text(encoding="ascii"))
    return None


def _apart(run: RunFolder) -> Iterator[str]:
    """Yield what lies in the folder and is no part of the run's road."""
    for path in sorted(run.rescue.glob("step-*")):
        yield f"{path.name} in rescue: the state of a run that had diverged"
    for path in sorted(run.checkpoints.glob("abandoned-*")):
        yield f"{path.name}: set aside when the run went back to an earlier step"
    for path in sorted(run.checkpoints.glob(f"{TEMPORARY_PREFIX}*")):
        yield f"{path.name}: begun and never finished; the next start removes it"


def _next(
    folder: Path, overview: Overview, checkpoints: Sequence[Saved], bundles: Sequence[str], *, is_live: bool
) -> Iterator[tuple[str, str]]:
    place = shlex.quote(str(folder))
    command = "train" if overview.kind in ("", "pre-training") else "finetune"
    resume = resume_command(command, folder)
    if is_live:
        yield "watch it", f"entrenar watch {place}"
        return
    if bundles:
        yield "is it the data or the machine", f"entrenar replay {shlex.quote(bundles[-1])}"
    if checkpoints and all(one.fault for one in checkpoints):
        yield "restore a copy of a checkpoint, or start again", f"{resume.replace('--resume', '--overwrite')} …"
    elif checkpoints and overview.status != "complete":
        yield "continue", resume
    elif checkpoints:
        yield "use it", generate_command(folder)
    else:
        yield "start it", f"{resume.replace(' --resume', '')} …"
    if overview.steps:
        yield "see its curves", f"entrenar report {place}"


def _lines(folder: Path, found: Examination) -> Iterator[str]:
    one = found.overview
    holder = f", process {found.holder}" if found.holder else ""
    status = f"runs now{holder}" if found.is_live else one.status
    yield f"{folder}: {one.kind or 'a run'} begun {one.begun}, {one.steps:,} steps; {status}"
    yield ""
    yield "what happened"
    if found.num_events > len(found.events):
        yield f"  … {found.num_events - len(found.events):,} earlier events in {RunFolder(folder).events}"
    yield from (f"  step {event.step:,}: {event.kind}: {event.message}" for event in found.events)
    yield from (f"  {finding.what} {finding.evidence}; {finding.advice}" for finding in found.findings)
    if not found.events and not found.findings:
        yield "  nothing out of the ordinary"
    yield ""
    yield "what is good"
    yield from _checkpoint_lines(found)
    if found.apart:
        yield ""
        yield "what else is there"
        yield from (f"  {line}" for line in found.apart[-_PLACES_SHOWN:])
        if len(found.apart) > _PLACES_SHOWN:
            yield f"  and {len(found.apart) - _PLACES_SHOWN} more"
    yield ""
    yield "what to do next"
    width = max(len(what) for what, _ in found.next)
    yield from (f"  {what:<{width}}   {command}" for what, command in found.next)


def _checkpoint_lines(found: Examination) -> Iterator[str]:
    newest = found.newest_good
    if not found.checkpoints:
        yield "  no checkpoint yet"
    for one in found.checkpoints:
        if one.fault is not None:
            yield f"  {checkpoint_name(one.step)}   DAMAGED: {one.fault}"
            continue
        loss = "" if one.held_out_loss is None else f", held-out loss {one.held_out_loss:.4f}"
        taken = "   a resume takes this one" if one is newest else ""
        yield f"  {checkpoint_name(one.step)}   whole, {one.size_bytes / 1e6:,.1f} MB{loss}{taken}"
