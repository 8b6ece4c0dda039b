"""What a server's record tells whoever looks at it from time to time."""

from __future__ import annotations

from numoe.cluster.member import MemberRecord, Replaced, ServerRecord


def record(supervisor: int, **members: tuple[str, int]) -> ServerRecord:
    found = [MemberRecord("expert", name, name, state, pid, "", 0, None, 0) for name, (state, pid) in members.items()]  # type: ignore[arg-type]
    return ServerRecord(pid=supervisor, members=tuple(found))


def test_each_replacement_is_told_once_when_it_runs() -> None:
    replaced = Replaced()
    told = [
        list(replaced.lines(found))
        for found in (
            record(1, a=("running", 2), b=("starting", 3)),
            record(1, a=("restarting", 2), b=("running", 3)),
            record(1, a=("restarting", 4), b=("running", 3)),
            record(1, a=("running", 4), b=("running", 3)),
            record(5, a=("running", 4), b=("running", 3)),
            record(5, a=("running", 4), b=("running", 3)),
        )
    ]
    assert told == [
        [], [], [], ["a (pid 2) died or hung; pid 4 has taken its place"],
        ["supervisor (pid 1) died or hung; pid 5 has taken its place"], [],
    ]  # fmt: skip
