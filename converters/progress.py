"""How a stage tells how far it is, without knowing who listens."""

from collections.abc import Callable

# progress(done, total, what): called at the start (done = 0) and after each finished piece of a stage.
Progress = Callable[[int, int, str], None]


def part_of(whole: Progress, part: int, parts: int, what: str) -> Progress:
    """What one of several equal parts (`part` of 0..parts-1) of a piece of work tells; the whole hears it at once."""

    def tell(done: int, total: int, _: str) -> None:
        whole(part * total + done, parts * total, what)

    tell(0, 1, what)
    return tell


def silent(done: int, total: int, what: str) -> None:
    """Nobody listens."""
