"""One job over many items: shared among processes, kept item by item, taken up again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import length_hint
from pathlib import Path
from typing import Any

from sparsemm.errors import ConfigError
from sparsemm.runs.journal import Journal, remove_journal
from sparsemm.runs.processes import Workers, workers


def work_through(
    items: Iterable[Any],
    work: Callable[[Any], dict[str, Any]],
    *,
    path: Path | None,
    settings: dict[str, Any],
    resume: bool = True,
    label: str = "",
    tally: str | None = None,
    watch: Callable[[dict[str, Any]], None] | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """The record that `work` makes of each item, in the order of the items; those that `path` holds are not made again.

    A record that gives a reason as `skipped` is made again: a file that was missing may have come.

    Under `accelerate launch` (or torchrun) the processes share the items, and each returns all records.

    Args:
        items: In a fixed order; those that can be indexed are made only where they are worked on.
        work: Makes a record, of JSON values, of an item.
        path: Journal of the records, one line each as soon as it is known; None where there is one process.
        settings: What the records depend on, as JSON values; a journal of other settings is not continued.
        resume: Continue from `path` where there is one; False starts again.
        label: Heads the progress bar.
        tally: An entry of the records whose sum the progress bar shows.
        watch: Is handed every record of this process, old ones too, in order; an error that it raises ends the work.
        progress: Show a progress bar.

    Raises:
        ConfigError: Several processes and no `path`.
        DataError: The journal was made with other settings.
    """
    us = workers()
    if us.count > 1 and path is None:
        raise ConfigError("several processes bring their pages together in files; give an output")
    if path is not None and not resume:
        if us.first:
            remove_journal(path)
        us.wait()
    journal = Journal(path, settings, part=None if us.count == 1 else us.rank, writes=us.writes)
    us.wait()  # nobody merges what another has yet to read
    done = {index for index, record in journal.records.items() if "skipped" not in record}
    count = total = 0
    with journal, _progress(items, us, label, progress) as bar:
        for index, item in _remaining(items, done, us):
            count = index + 1
            if item is not None:
                journal.append(index, work(item))
            if us.owns(index):
                if watch is not None:
                    watch(journal.records[index])
                if tally is not None:
                    total += journal.records[index].get(tally, 0)
                    bar.set_postfix({tally: total}, refresh=False)
                bar.update()
    us.wait()
    if us.first:
        journal.merge()
    us.wait()
    journal.reread()
    return [journal.records[index] for index in range(count)]


def _remaining(items: Iterable[Any], done: set[int], us: Workers) -> Iterator[tuple[int, Any]]:
    """Every item by number, None in place of the done ones and of those of other processes."""
    by_number = isinstance(items, Sequence)
    for index, item in enumerate(range(len(items)) if by_number else items):
        wanted = us.owns(index) and index not in done
        yield index, (items[index] if by_number else item) if wanted else None


def _progress(items: Iterable[Any], us: Workers, label: str, show: bool) -> Any:
    """A bar of this process's items; of several processes the first one shows its own."""
    from tqdm.auto import tqdm

    total = -(-length_hint(items) // us.count) or None
    return tqdm(total=total, unit="image", desc=label, disable=not (show and us.first))
