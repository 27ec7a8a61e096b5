"""Run transformers' and TRL's own trainer tests with our class in place of theirs.

    python tests/upstream/compare.py --transformers DIR --trl DIR

DIR are their sources, of which ``tests/`` and ``conftest.py`` are enough. Every suite runs as it
is, and by LeMoTrainer, LeMoSFTTrainer or LeMoDPOTrainer with ``lemo_config=None``, retention 1 and
retention 0.5. The tally tells where a test ends otherwise. With ``--gentle`` trainings are in fp32
and take small steps, so that all their figures can be compared; tests may then fail, with the stock
class as well.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tally import SUITES, tally, write_tally

MODES = ("stock", "none", "1", "0.5")
HERE = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transformers", type=Path, help="folder with tests/trainer/")
    parser.add_argument("--trl", type=Path, help="folder with tests/test_{sft,dpo}_trainer.py")
    parser.add_argument("--output", type=Path, default=Path("out/upstream"))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES)
    parser.add_argument("--limit", type=int, default=300, help="seconds a test may take")
    parser.add_argument("--gentle", action="store_true")
    parser.add_argument("-k", default="", help="only these tests, as of pytest")
    asked = parser.parse_args()
    output = asked.output.resolve()
    suites = {}
    if asked.transformers:
        root = asked.transformers.resolve()
        suites["transformers"] = root, sorted((root / "tests/trainer").glob("test_*.py"))
    if asked.trl:
        root = asked.trl.resolve()
        suites["trl"] = root, [root / "tests/test_sft_trainer.py"]
        suites["trl-dpo"] = root, [root / "tests/test_dpo_trainer.py"]
    suites = {name: found for name, found in suites.items() if name in asked.suites}
    for name, (root, files) in suites.items():
        if not files or not files[0].is_file():
            parser.error(f"--{name}={root}: the folder has no trainer tests")
    if not (output / "stand_ins").is_dir():
        from stand_ins import make_stand_ins  # takes seconds to import

        make_stand_ins(output / "stand_ins")
    for name, (root, files) in suites.items():
        for mode in asked.modes:
            tests = [*map(str, files), "-k", asked.k]
            tests += ["--lemo-gentle"] if asked.gentle else []
            run(output, name, mode, root, tests, asked.limit)
    write_tally(output, tally(output, MODES))
    print((output / "tally.md").read_text())


def run(output: Path, suite: str, mode: str, root: Path, tests: list[str], limit: int) -> None:
    """One suite in one process; a line a test goes to ``{suite}-{mode}.jsonl``."""
    record = output / f"{suite}-{mode}.jsonl"
    record.unlink(missing_ok=True)
    folder = output / f"{suite}-{mode}"  # what tests leave behind stays in it
    folder.mkdir(exist_ok=True)
    for organization in (output / "stand_ins").iterdir():
        if not (folder / organization.name).exists():
            (folder / organization.name).symlink_to(organization)
    (output / "pytest.ini").write_text("[pytest]\n")
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(output / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    trl = {"trl": "trl.SFTTrainer", "trl-dpo": "trl.DPOTrainer"}
    name = {"transformers": "transformers.Trainer", **trl}[suite]
    command = [sys.executable, "-m", "pytest", *tests, "-p", "in_place", "-q", "--tb=short"]
    command += ["-c", str(output / "pytest.ini"), f"--rootdir={root}", f"--confcutdir={root}"]
    command += [f"--lemo-class={name}", f"--lemo-mode={mode}", f"--lemo-record={record}"]
    command += [f"--lemo-limit={limit}", "-p", "no:cacheprovider", "-W", "ignore"]
    with (output / f"{suite}-{mode}.log").open("w") as log:
        done = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=log)
    if done.returncode not in (0, 1) or not record.is_file():
        raise SystemExit(
            f"{suite} with {mode}: pytest ended with {done.returncode}, see {log.name}"
        )
    print(f"{suite} with {mode}: {len(record.read_text().splitlines())} tests", flush=True)


if __name__ == "__main__":
    main()
