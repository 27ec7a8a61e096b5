"""A progress bar of work whose amount is a guess, which gets better."""

from tqdm.auto import tqdm


class Estimated(tqdm):
    """Never says that all is done before it is closed; then what was done is all."""

    def expect(self, more: int) -> None:
        """So much is left, as far as one can tell."""
        self.total = self.n + max(1, more)
        self.refresh()

    def update(self, n: float | None = 1) -> bool | None:
        """As tqdm's; beyond what was expected there is always one more."""
        self.total = max(self.total or 0, self.n + (n or 0) + 1)
        return super().update(n)

    def close(self) -> None:
        """As tqdm's."""
        if not self.disable and self.n:
            self.total = self.n
            self.refresh()
        super().close()
