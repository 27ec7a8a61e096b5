"""The search for the longest length that fits, by trying."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

STEP = 4096  # lengths are multiples of it
GAP = 1.04  # between the longest length that fits and one that does not
MOST_TRIALS = 10


@dataclass
class Search:
    """What trials have shown of one provider under one cap.

    Attributes:
        step: Lengths are multiples of it.
        peaks: GiB by length, of trials that fit or of dry steps without a cap.
        fits: The longest length that fits; 0 if none is known.
        limit: Why the shortest one that does not fit does not.
        too_long: That length, or None.
        trials: How many there were.
    """

    step: int = STEP
    peaks: dict[int, float] = field(default_factory=dict)
    fits: int = 0
    too_long: int | None = None
    limit: str | None = None
    trials: int = 0

    def round_up(self, tokens: float) -> int:
        """The next multiple of the step."""
        return -(-int(tokens) // self.step) * self.step

    @property
    def done(self) -> bool:
        """Whether both ends are known closely enough."""
        if self.too_long is None:
            return False
        return self.too_long <= max(self.round_up(GAP * self.fits), self.fits + self.step)

    def guess(self, cap_gib: float) -> int:
        """The next length to try."""
        line = self._line(cap_gib)
        if self.too_long is None:
            least = max(self.round_up(GAP * self.fits), self.fits + self.step)
            return max(least, line or 2 * least)
        if self.fits == 0:
            half = self.too_long // 2 // self.step * self.step
            near = line is not None and self.limit == "oom" and line < self.too_long / GAP
            return max(self.step, line if near else half)
        just_above = max(self.round_up(GAP * self.fits), self.fits + self.step)
        if line is not None and self.fits < line < self.too_long:
            return line
        middle = (self.fits + self.too_long) // 2 // self.step * self.step
        return max(self.fits + self.step, min(middle, self.too_long - self.step, 2 * just_above))

    def _line(self, cap_gib: float) -> int | None:
        """Where a line through the last two peaks meets the cap, a little below."""
        known = sorted(self.peaks)[-2:]
        if len(known) < 2 or self.peaks[known[1]] <= self.peaks[known[0]]:
            return None
        (a, x), (b, y) = ((tokens, self.peaks[tokens]) for tokens in known)
        meets = a + (0.99 * cap_gib - x) * (b - a) / (y - x)
        return max(self.step, int(meets) // self.step * self.step)

    def add(self, tokens: int, status: str, peak_gib: float) -> None:
        """Take in a trial; any status but "ok" is a limit."""
        self.trials += 1
        if status == "ok":
            self.fits = max(self.fits, tokens)
            self.peaks[tokens] = peak_gib
        elif self.too_long is None or tokens < self.too_long:
            self.too_long, self.limit = tokens, status


def search_longest(
    search: Search, try_at: Callable[[int], tuple[str, float]], cap_gib: float, deadline: float
) -> Search:
    """Try lengths until the longest is known within `GAP`, or trials or time are used up."""
    while not search.done and search.trials < MOST_TRIALS and time.monotonic() < deadline:
        tokens = search.guess(cap_gib)
        if search.too_long is not None and tokens >= search.too_long:
            break
        search.add(tokens, *try_at(tokens))
        if search.too_long is not None and search.too_long <= search.step:
            break
    return search
