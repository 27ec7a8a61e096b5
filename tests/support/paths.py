"""Places inside the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "demo"
MODEL = DEMO / "model"
