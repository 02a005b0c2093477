"""How a stage tells how far it is, without knowing who listens."""

from collections.abc import Callable

# progress(done, total, what): called at the start (done = 0) and after each finished piece of a stage.
Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, what: str) -> None:
    """Nobody listens."""
