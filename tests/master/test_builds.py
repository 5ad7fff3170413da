from __future__ import annotations

from termite.master.builds import ANSWERED, KEPT, REMOTE, Build, Builds, token_in


def env(token: bytes) -> list[bytes]:
    return [b"PATH=/bin", b"TERMITE_BUILD=" + token, b"X=TERMITE_BUILD=9"]


def begun(builds: Builds, token: bytes = b"7") -> Build:
    builds.begin(token, int(token), 100.0, 1000)
    return builds.of(env(token))


def test_a_build_is_one_line_at_its_end() -> None:
    builds = Builds()
    build = begun(builds)
    for what, n in ((REMOTE, 10), (ANSWERED, 1), ("local by rule", 2), ("local, no worker", 1), ("cancelled", 1)):
        for _ in range(n):
            builds.count(build, what)
    build.workers |= {"a", "b"}
    build.received = 2_500_000
    build.conflicts = 1
    ended = builds.end(b"7", 103.25, 1999)
    assert ended is not None
    assert ended.summary() == (
        "15 commands: 10 on 2 workers, 1 answered by the master, 3 here (2 by rule, 1 no worker), 1 cancelled, "
        "1 conflict; 999 bytes sent, 2.5 MB received, 3.2 s"
    )
    assert ended.as_dict()["counts"] == dict(build.counts)


def test_what_is_nothing_is_left_out() -> None:
    builds = Builds()
    builds.count(begun(builds), REMOTE)
    builds.of(env(b"7")).workers.add("a")
    build = builds.so_far(b"7", 100.0, 1000)
    assert build is not None
    assert build.summary() == "1 command: 1 on 1 worker; 0 bytes sent, 0 bytes received, 0.0 s"


def test_builds_that_run_at_the_same_time_are_counted_apart() -> None:
    builds = Builds()
    one, two = begun(builds, b"1"), begun(builds, b"2")
    builds.count(one, REMOTE)
    builds.count(two, REMOTE)
    builds.count(builds.of([b"PATH=/bin"]), REMOTE)
    assert (one.commands(), two.commands(), builds.total.commands()) == (1, 1, 3)
    assert builds.running == 2


def test_a_build_ends_once_and_a_stranger_never() -> None:
    builds = Builds()
    begun(builds)
    assert builds.end(b"8", 1.0, 0) is None
    assert builds.end(b"7", 1.0, 0) is not None
    assert builds.end(b"7", 1.0, 0) is None
    assert builds.of(env(b"7")) is builds.total


def test_ended_builds_are_kept_within_bounds() -> None:
    builds = Builds()
    for i in range(1, KEPT + 10):
        begun(builds, b"%d" % i)
        builds.end(b"%d" % i, 1.0, 0)
    assert len(builds.ended) == KEPT


def test_the_token_is_read_from_the_environment() -> None:
    assert token_in(env(b"12")) == b"12"
    assert token_in([b"XTERMITE_BUILD=1"]) == b""
