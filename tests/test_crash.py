"""Commands killed, on full and read-only disks, and twice at once: a short form of `make crash`.

In a process of its own, since children are forked and this one may have threads.
"""

import json
import os
import subprocess
import sys
from collections import Counter

import pytest
from support.paths import ROOT


@pytest.mark.soak
def test_what_is_done_to_commands_changes_no_result(tmp_path):
    tally = tmp_path / "tally.json"
    packages = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    ended = subprocess.run(
        [sys.executable, "-m", "crash", "--kills", "6", "--full", "1", "--json", str(tally)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(packages)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    done = Counter(trial["harm"] for trial in json.loads(tally.read_text()))
    assert sum(done[harm] for harm in done if harm.startswith("killed")) == 6
    assert done["two at once"] == 5
