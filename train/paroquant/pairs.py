"""Which channels are rotated together: random, from a seed alone, and the same as in the original implementation."""

import functools
import itertools
import random
from typing import NamedTuple

import numpy as np


class Pairs(NamedTuple):
    """Of I input channels in groups of g, for R rotations one after the other."""

    channels: np.ndarray  # int16 [R, I], within the group: pair t of group k is channels[r, k * g + 2 * t : ... + 2]
    is_real: np.ndarray  # bool [R, I / 2]; the others were left over and are never rotated: their angle stays 0


@functools.lru_cache(maxsize=8)  # the linears of a block with as many inputs share their pairs
def select_pairs(seed: int, num_groups: int, *, group_size: int = 128, num_rotations: int = 8) -> Pairs:
    """Disjoint random pairs for each rotation, no pair twice in a group.

    Python's generator shuffles all pairs of each group, one group after the other. A rotation takes those of its
    group's list, from its begin, that were never taken and whose channels are still free. Later rotations may end with
    channels left over, which are paired in rising order and marked.

    Args:
      seed: that of the model plus the index of the layer.
      num_groups: I / group_size.
      group_size: channels of a group, even.
      num_rotations: R.
    """
    if group_size < 2 or group_size % 2:
        raise ValueError(f"group_size must be positive and even; got {group_size}")
    if num_groups < 1 or num_rotations < 1:
        raise ValueError(f"num_groups and num_rotations must be positive; got {num_groups} and {num_rotations}")
    generator = random.Random(seed)
    lists = []
    for _ in range(num_groups):
        pairs = [*itertools.combinations(range(group_size), 2)]
        generator.shuffle(pairs)
        lists.append(pairs)
    channels = np.empty((num_rotations, num_groups, group_size), np.int16)
    is_real = np.zeros((num_rotations, num_groups, group_size // 2), bool)
    for group, pairs in enumerate(lists):
        for rotation in range(num_rotations):
            free, taken, rest = set(range(group_size)), [], []
            for pair in pairs:
                if len(free) >= 2 and pair[0] in free and pair[1] in free:
                    free.difference_update(pair)
                    taken.append(pair)
                else:
                    rest.append(pair)
            pairs = rest
            left = sorted(free)
            channels[rotation, group] = [*itertools.chain(*taken), *left]
            is_real[rotation, group, : len(taken)] = True
    result = Pairs(channels.reshape(num_rotations, -1), is_real.reshape(num_rotations, -1))
    for array in result:
        array.flags.writeable = False  # later calls get the same arrays
    return result
