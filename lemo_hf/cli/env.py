"""`lemo env`."""

import json

from lemo_hf.cli.options import AsJson


def env(as_json: AsJson = False) -> None:
    """Print versions, GPUs and attention kernels, for a bug report."""
    from lemo_hf.report.environment import environment

    found = environment()
    if as_json:
        print(json.dumps(found))
        return
    for section, facts in found.items():
        for name, value in facts.items():
            if isinstance(value, list):
                value = ", ".join(map(str, value)) or "none"
            elif isinstance(value, bool):
                value = "yes" if value else "no"
            print(f"- {section}, {name}: {'-' if value is None else value}")
