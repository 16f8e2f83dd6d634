"""Kills small trainings by SIGKILL, resumes them, and compares each with the one that was left alone.

    cd tests && python -m trials.kills FOLDER KILLS SEED [TRAINING...]

So many kills, shared among the trainings: one at the first and one at the last commit point of each kind, one in the first backward pass
(of the comparison before training, if there is one), the others at random moments, half of these several times in a row before the run
may finish. With 0, each kind of commit point in one training, but for small files that are written as the journal is, and a few others.

Every trial is a fork of this process, which has imported everything and computed nothing: torch's threads do not survive a fork.
Prints a table, then one JSON line: {NAME: {"trials": n, "killed": n, "identical": n, "kinds": [...], "failed": [...]}}.
"""

import json
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from lowmem_pnn.stores import disk
from trials.trainings import (
    TRAININGS,
    Reference,
    Training,
    differences,
    in_child,
    kill_after,
    prepare,
    run_reference,
    when_training_begins,
)

# Small files that are written as the journal is, and that a resume reads no more or less than it.
_ALIKE = {f"{what} {name}" for what in ("written", "renamed") for name in ("config.json", "config.toml", "metrics.csv")}

Kill = tuple[Literal["point", "backward", "moment"], float]
"""At the commit point of a number, in the backward pass of a number, or so many seconds after training begins."""


@dataclass
class Tally:
    """What came of the trials of one training."""

    trials: int = 0
    killed: int = 0
    identical: int = 0
    kinds: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def kind_of(point: str) -> str:
    """Return the kind of a commit point: its name, without the numbers of partitions, generations and shards."""
    return re.sub(r"\d+|\.?reference\S*", "#", re.sub(r"-(train|val|test)\S*", "", point))


def kill_at(kill: Kill, training: Training, path: Path, *, resume: bool) -> bool:
    """Run a training that is killed; whether it was, or had ended before."""
    work: Callable[[], None] = (lambda: training.finish(path)) if resume else (lambda: training.run(path))
    kind, place = kill
    if kind == "moment":

        def until_moment(began: Callable[[], None]) -> None:
            when_training_begins(began)
            work()

        return kill_after(place, until_moment) == -signal.SIGKILL
    count = 0

    def reached(*_: object) -> None:
        nonlocal count
        if count == place:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def watch_backward() -> None:
        backward = torch.autograd.backward

        def watched(*arguments: Any, **options: Any) -> None:
            reached()
            backward(*arguments, **options)

        torch.autograd.backward = watched

    def until_point() -> None:
        if kind == "point":
            disk.commit_point = reached
        else:
            when_training_begins(watch_backward)
        work()

    return in_child(until_point) == -signal.SIGKILL


def try_kills(kills: list[Kill], training: Training, path: Path, reference: Reference, tally: Tally) -> None:
    """Kill a training several times in a row, have it finish, and compare it."""
    shutil.rmtree(path, ignore_errors=True)
    killed = sum([kill_at(kill, training, path, resume=number > 0) for number, kill in enumerate(kills)])
    finished = in_child(lambda: training.finish(path)) == 0
    found = differences(path, reference.path) if finished else ["does not finish"]
    tally.trials += 1
    tally.killed += killed
    tally.identical += not found
    if found:
        places = [reference.points[int(place)] if kind == "point" else f"{kind} {place:.3f}" for kind, place in kills]
        tally.failed.append(f"killed at {', '.join(places)}: {'; '.join(found)}")
        print(tally.failed[-1], file=sys.stderr, flush=True)


def try_training(training: Training, folder: Path, least: int, known: set[str], chance: random.Random) -> Tally:
    """Kill a training at the commit points of each kind that is not known yet, and then at random, until it was killed often enough.

    Args:
        training: what is trained.
        folder: folder to work in.
        least: kills; 0 for the commit points but those of `_ALIKE`, and one trial of two kills at random.
        known: kinds of commit points at which a training was killed before; where `least` is 0 they are left out.
        chance: draws the moments.
    """
    prepare(training)
    reference = run_reference(training, folder / "reference")
    tally, path = Tally(), folder / "trial"
    kinds = [kind_of(point) for point in reference.points]
    points = {kinds.index(kind) for kind in kinds if least or kind not in known | _ALIKE}
    if least:
        points |= {len(kinds) - 1 - kinds[::-1].index(kind) for kind in kinds}
    for point in sorted(points):
        try_kills([("point", point)], training, path, reference, tally)
    try_kills([("backward", 0)], training, path, reference, tally)  # in the comparison before training, if there is one
    tally.kinds = sorted({kinds[point] for point in points})
    known |= set(kinds)

    def somewhere() -> Kill:
        if chance.random() < 0.5:
            return "point", chance.randrange(len(kinds))
        return "moment", chance.uniform(0, reference.seconds)

    in_a_row = not least
    while (tally.killed < least and tally.trials < 3 * least) if least else tally.trials < len(points) + 2:
        moments: list[Kill] = [("moment", chance.uniform(0, reference.seconds))]
        kills = [somewhere() for _ in range(3 if least else 2)] if in_a_row else moments
        try_kills(kills, training, path, reference, tally)
        in_a_row = not in_a_row
    return tally


def main() -> None:
    """Run the trials."""
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    names = sys.argv[4:] or list(TRAININGS)
    chance, known = random.Random(seed), set[str]()
    tallies: dict[str, Tally] = {}
    print("| configuration | trials | killed | identical |\n| --- | --- | --- | --- |")
    for number, name in enumerate(names):
        place = folder / str(number)
        place.mkdir(parents=True)
        left = kills and max(1, kills - sum(tally.killed for tally in tallies.values()))
        tallies[name] = tally = try_training(TRAININGS[name], place, -(-left // (len(names) - number)), known, chance)
        print(f"| {name}: {TRAININGS[name].features} | {tally.trials} | {tally.killed} | {tally.identical} |", flush=True)
        shutil.rmtree(place)
    sums = [sum(getattr(tally, key) for tally in tallies.values()) for key in ("trials", "killed", "identical")]
    print(f"| all | {' | '.join(map(str, sums))} |")
    print(json.dumps({name: asdict(tally) for name, tally in tallies.items()}))


if __name__ == "__main__":
    main()
