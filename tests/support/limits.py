"""A piece of Python in a process that may take so much memory and time and no more."""

import subprocess
import sys


def limited(code, folder, gib, seconds=60):
    """Run ``code`` in ``folder``: it may take ``gib`` more than the imports at its top have."""
    bound = (
        "import resource\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (used + {int(gib * 2**30)},) * 2)\n"
    )
    imports = [line for line in code.splitlines() if line.startswith(("import ", "from "))]
    result = subprocess.run(
        [sys.executable, "-c", "\n".join([*imports, bound, code])],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
