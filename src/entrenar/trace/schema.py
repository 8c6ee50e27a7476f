"""The tables of a trace file.

Strings, frames and stacks are stored once and named by number: a stack is its innermost frame and the stack around it,
so that a million calls from the same lines cost a row of numbers each. `tally` counts every call; `call` may hold a
sample of the fast ones (see `Writer`).
"""

from typing import overload

VERSION = 1

TABLES = """
create table meta (key text primary key, value text not null) without rowid;
create table string (id integer primary key, text text not null unique);
create table frame (
    id integer primary key, function integer not null, file integer not null, line integer not null, generated integer
);
create table stack (id integer primary key, parent integer not null, frame integer not null);
create table process (
    pid integer not null, parent_pid integer, command text not null, started_ns integer not null,
    ended_ns integer, exit_code integer, rank integer, primary key (pid, started_ns)
) without rowid;
create table span (
    id integer primary key, parent integer, name integer not null, pid integer not null, tid integer not null,
    start_ns integer not null, end_ns integer, status integer not null, attributes text, links text
);
create index span_start on span (start_ns);
create table call (
    name integer not null, pid integer not null, tid integer not null, start_ns integer not null, duration_ns integer,
    result integer, error integer, size_bytes integer, path integer, arguments text, stack integer not null,
    span integer
);
create table tally (
    name integer not null, stack integer not null, span_name integer not null, calls integer not null,
    errors integer not null, total_ns integer not null, max_ns integer not null, size_bytes integer not null,
    slow integer not null, histogram text not null, primary key (name, stack, span_name)
) without rowid;
create table anomaly (
    operation text not null, kind text not null, at_ns integer not null, duration_ns integer not null,
    baseline_ns integer not null, sigma real not null, severity text not null, pid integer, tid integer, span integer,
    function text, file text, line integer, path text
);
create table metric (name integer not null, at_ns integer not null, value real not null);
create table mark (kind text not null, text text not null, at_ns integer not null, pid integer, tid integer,
    span integer
);
"""


@overload
def signed(number: int) -> int: ...
@overload
def signed(number: None) -> None: ...
def signed(number: int | None) -> int | None:
    """Return an unsigned 64-bit id as SQLite holds it."""
    return number if number is None or number < 1 << 63 else number - (1 << 64)


@overload
def unsigned(number: int) -> int: ...
@overload
def unsigned(number: None) -> None: ...
def unsigned(number: int | None) -> int | None:
    """Return the id that SQLite holds as a signed number."""
    return number if number is None or number >= 0 else number + (1 << 64)
