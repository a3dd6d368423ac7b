"""Work on many objects side by side: one failed object never stops the others, finished ones are not done again."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

# Read before torch and numba start their threads: each worker owns one core.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "NUMBA_NUM_THREADS": "1"}


def for_each(work: Callable, items: Iterable[tuple], workers: int, description: str, progress: bool = True) -> dict[str, str]:
    """Call `work(*item)` for every item in worker processes; the item's first member is its id.

    `work` keeps its own results (a file, written whole), so a stopped run goes on where it was.

    Returns:
        The reason of failure of each item that failed, by id.
    """
    items = list(items)
    failures: dict[str, str] = {}
    before = {name: os.environ.get(name) for name in _ONE_THREAD}
    os.environ.update(_ONE_THREAD)
    try:
        with ProcessPoolExecutor(max(1, min(workers, len(items))), multiprocessing.get_context("spawn")) as pool:
            pending = {pool.submit(work, *item): item[0] for item in items}
            for future in tqdm(as_completed(pending), total=len(pending), desc=description, unit="object", disable=not progress):
                try:
                    future.result()
                except BrokenProcessPool:
                    failures[pending[future]] = "the worker process died; run the stage again"
                except Exception as error:  # whatever one object's trouble is, the others go on
                    failures[pending[future]] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    return failures
