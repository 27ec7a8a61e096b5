"""Kill commands, fill their disk, make it read-only, run two at once; print a tally.

PYTHONPATH=.:tests python -m crash --kills 100
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from crash.trials import Trials


def main() -> int:
    """Exit code 1 if anything came out otherwise than without harm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="In all, half of them at random.")
    parser.add_argument("--full", type=int, default=30, help="Full disks.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="One of the scenarios.")
    parser.add_argument("--json", type=Path, help="File for the tally.")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lemo-crash-"))
    started = time.monotonic()
    trials = Trials(folder, random.Random(args.seed), args.only)
    trials.kills(args.kills)
    trials.full_disks(args.full)
    trials.read_only()
    trials.two_at_once()
    tally = Counter((t.scenario, t.harm) for t in trials.done)
    good = Counter((t.scenario, t.harm) for t in trials.done if t.wrong is None)
    print("| command | harm | trials | as without |\n| --- | --- | --- | --- |")
    for (scenario, harm), number in tally.items():
        print(f"| `{scenario}` | {harm} | {number} | {good[scenario, harm]} |")
    for trial in trials.done:
        if trial.wrong is not None:
            print(f"{trial.scenario}, {trial.harm} ({trial.detail}): {trial.wrong}")
    for harm in sorted(trials.left_out):
        print(f"{harm}: left out, since no process may mount here.")
    print(f"{time.monotonic() - started:.0f} seconds.")
    if args.json is not None:
        args.json.write_text(json.dumps([vars(trial) for trial in trials.done], indent=1) + "\n")
    failed = sum(tally.values()) - sum(good.values())
    if not failed:
        shutil.rmtree(folder)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
