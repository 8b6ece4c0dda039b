"""What a server's record tells: whoever looks at it from time to time, and a supervisor that takes over."""

from __future__ import annotations

import msgspec
import pytest

from numoe.cluster.member import Member, MemberRecord, Replaced, ServerRecord


def record(supervisor: int, **members: tuple[str, int]) -> ServerRecord:
    found = [Member("expert", name, state=state, pid=pid).record() for name, (state, pid) in members.items()]  # type: ignore[arg-type]
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


def taken_over(member: Member) -> Member:
    """The member as the next supervisor knows it, whose actor is gone."""
    remembered = msgspec.msgpack.decode(msgspec.msgpack.encode(member.record()), type=MemberRecord)
    return Member(**msgspec.structs.asdict(remembered))


def test_who_crashes_again_and_again_is_known_to_the_next_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("numoe.cluster.member.time.monotonic", lambda: now)
    member = Member("attention", "attention")
    for crashes in (1, 2, 3):
        member.came_up()
        now += 0.5
        member = taken_over(member)
        member.died()
        member = taken_over(member)  # once more while it is replaced: that is no other death
        member.died()
        assert (member.crashes, member.restarts) == (crashes, crashes)
    member.came_up()
    now += 60
    member = taken_over(member)
    member.died()
    assert (member.crashes, member.restarts) == (0, 4), "it ran well meanwhile"
