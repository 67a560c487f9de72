"""Batches of rows: shuffled and endless for training, in order and padded for evaluation.

The training iterator is grain's elastic one: its state is the number of rows consumed by all processes
together, so a run continues exactly where it stopped also on another number of processes.
"""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

Batch = dict[str, np.ndarray]


@runtime_checkable
class Rows(Protocol):
    """Random access to rows of equal shapes; `RowStore` is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Batch: ...


def batches(
    store: Rows,
    *,
    global_batch: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    shuffle: bool = True,
    threads: int = 2,
    prefetch: int = 64,
) -> Any:
    """Endless batches of this process's share of every global batch.

    Args:
        store: a `RowStore`, or anything else that gives dicts of equal-shaped arrays.
        global_batch: rows per step over all processes; divisible by `process_count`.
        seed: of the shuffle; each epoch has another order.
        process_index: this process's number, as `jax.process_index()`.
        process_count: as `jax.process_count()`.
        shuffle: False keeps the order of the store.
        threads: that read rows.
        prefetch: rows read ahead.

    Returns:
        A grain iterator: `next()` gives a dict of arrays [global_batch / process_count, T], `get_state()` a
        JSON-able dict, `set_state()` restores it. The parts of processes 0, 1, ... one after the other are
        the batch that one process alone would get.

    Raises:
        ValueError: sizes that do not divide or are not positive.
    """
    import grain

    if process_count < 1 or not 0 <= process_index < process_count:
        raise ValueError(f"process_index must lie in 0..{process_count - 1}; got {process_index}")
    if global_batch < 1 or global_batch % process_count:
        raise ValueError(f"global_batch must be a positive multiple of {process_count} processes; got {global_batch}")
    if threads < 1 or prefetch < 1:
        raise ValueError(f"threads and prefetch must be positive; got {threads} and {prefetch}")
    if not len(store):
        raise ValueError("the row store is empty")
    dataset = grain.MapDataset.source(store).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    return grain.experimental.ElasticIterator(
        _contiguous(dataset.repeat(), global_batch, process_count),
        global_batch,
        grain.sharding.ShardOptions(process_index, process_count),
        read_options=grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch),
        multiprocessing_options=None,
    )


def evaluation_batches(
    store: Rows,
    *,
    global_batch: int,
    max_rows: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """One pass in order; the last batch is filled with rows of padding (all arrays zero, so no loss).

    Args:
        store: a `RowStore`, or anything else that gives dicts of equal-shaped arrays.
        global_batch: rows per step over all processes; divisible by `process_count`.
        max_rows: stop after this many rows, spread evenly over the store; None = all.
        process_index: this process's number.
        process_count: all processes; each yields the same number of batches.

    Yields:
        Dicts of arrays [global_batch / process_count, T].
    """
    if global_batch < 1 or global_batch % process_count:
        raise ValueError(f"global_batch must be a positive multiple of {process_count} processes; got {global_batch}")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be positive or None; got {max_rows}")
    rows = np.arange(len(store))
    if max_rows is not None and max_rows < len(rows):
        rows = np.linspace(0, len(rows) - 1, max_rows).round().astype(int)
    padding = {key: np.zeros_like(value) for key, value in store[0].items()}
    for start in range(0, len(rows), global_batch):
        mine = range(start + process_index, start + global_batch, process_count)
        items = [store[int(rows[i])] if i < len(rows) else padding for i in mine]
        yield {key: np.stack([item[key] for item in items]) for key in padding}


def _contiguous(dataset: Any, batch: int, parts: int) -> Any:
    """The dataset reordered within each batch, so that taking every `parts`-th element gives contiguous parts.

    The elastic iterator gives process p elements p, p + parts, ...; a random draw per row (which tokens are
    masked) then would depend on the number of processes.
    """
    if parts == 1:
        return dataset
    import grain

    class Contiguous(grain.MapDataset):
        def __len__(self) -> int:
            return len(self._parent)

        def __getitem__(self, index: int | slice) -> Any:
            if isinstance(index, slice):
                return self.slice(index)
            start, row = index - index % batch, index % batch
            return self._parent[start + row % parts * (batch // parts) + row // parts]

    return Contiguous(dataset)
