"""Seeded schedules of faults, and the harness that runs them held to what it promises to notice."""

from __future__ import annotations

import os
from pathlib import Path

import harness
import pytest
import schedules

SEEDS = int(os.environ.get("SEEDS", "4"))

# Put on PYTHONPATH as sitecustomize.py, so that every process of a run is broken in one way.
BROKEN = {
    "REDONE": """
# Claims hold nothing: everybody gets what he asks for.
import ragfleet.claims as claims
claims.ClaimStore.try_claim = lambda self, claim, holder: True
claims.ClaimStore.holder = lambda self, chunk, generation: claims.Holder("9.9", "none", 0)
""",
    "DOUBLED": """
# The merge does not choose: a key that was answered twice gets two rows.
import msgspec
import ragfleet.merge as merge
chosen = merge.merged_rows
def all_of_them(job, statistics):
    seen, twice = set(), set()
    for path in job.winners.paths:
        for line in path.read_bytes().splitlines():
            try:
                row = msgspec.json.decode(line)
                (twice if row["request_key"] in seen else seen).add(row["request_key"])
                if row["request_key"] in twice:
                    twice.add(row["id"])
            except (msgspec.DecodeError, KeyError, UnicodeDecodeError):
                pass
    for row in chosen(job, statistics):
        yield row
        if msgspec.json.decode(row)["id"] in twice:
            yield row
merge.merged_rows = all_of_them
""",
    "SURVIVORS": """
# One worker's death takes the others with it, as a restart of all ranks would.
import ragfleet.launchers.supervisor as supervisor
replace = supervisor.Supervisor._replace
def all_of_them(self, process, code):
    for other in list(self._running.values()):
        other.kill()
    replace(self, process, code)
supervisor.Supervisor._replace = all_of_them
""",
    "LOST": """
# The reader gives up at a line that is no result.
import ragfleet.shards as shards
tolerant = shards._rows
def strict(path, start_bytes=0):
    for offset, line, key, row in tolerant(path, start_bytes):
        if row is None:
            raise ValueError(f"{path}: a torn line")
        yield offset, line, key, row
shards._rows = strict
""",
}


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    return harness.reference(tmp_path_factory.mktemp("reference"))


# The last one: two marks of finished chunks are deleted before anybody else has seen them.
@pytest.mark.parametrize("seed", [*range(SEEDS), 37])
def test_a_schedule_of_faults_loses_and_doubles_nothing(seed: int, expected: list[bytes]) -> None:
    problems, story = harness.run_seed(seed, expected)
    assert not problems, "\n".join([*problems, *story])


def schedule_of(seed: int, during: list[schedules.Fault], between: list[str]) -> schedules.Schedule:
    return schedules.Schedule(seed, "OneByOne", [(2, during)], [between], last_workers=2)


def run_broken(
    check: str,
    during: list[schedules.Fault],
    between: list[str],
    expected: list[bytes],
    where: Path,
) -> list[str]:
    """What the harness finds in a system that is broken in one way."""
    broken, folder = where / "broken", where / "run"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(BROKEN[check])
    environ = harness.environment()
    environ["PYTHONPATH"] = os.pathsep.join((str(broken), environ["PYTHONPATH"]))
    folder.mkdir()
    return harness.Harness(schedule_of(0, during, between), folder, environ).run(expected)


@pytest.mark.parametrize(
    ("check", "during", "between"),
    [
        ("REDONE", "kill_all", []),
        ("DOUBLED", "kill_all", ["duplicate_line"]),
        ("LOST", "kill_all", ["garbage"]),
        ("SURVIVORS", "kill_worker", []),
    ],
)
def test_the_harness_notices(
    check: str, during: str, between: list[str], expected: list[bytes], tmp_path: Path
) -> None:
    problems = run_broken(check, [schedules.Fault(during, 40, 0)], between, expected, tmp_path)
    assert any(check in problem for problem in problems), problems


@pytest.mark.parametrize(
    "check",
    ["LOST", *(pytest.param(name, marks=pytest.mark.slow) for name in ("DOUBLED", "SURVIVORS"))],
)
def test_it_is_the_fault_that_shows_what_is_broken(
    check: str, expected: list[bytes], tmp_path: Path
) -> None:
    """Without one, these three are no worse than the real thing: else they would prove nothing."""
    assert run_broken(check, [], [], expected, tmp_path) == []
