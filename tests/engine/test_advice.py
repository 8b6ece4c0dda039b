"""Memory that is there before it is needed."""

from __future__ import annotations

import mmap

import numpy as np
import psutil

from numoe.engine.advice import touch_beside

NBYTES = 96 << 20


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def test_touched_memory_is_there_and_keeps_what_was_written() -> None:
    with mmap.mmap(-1, NBYTES) as area:
        array = np.frombuffer(area, np.uint8)
        array[5], array[-1], before = 7, 8, resident()
        touch_beside(array[3:-1], "a test").join()
        assert resident() - before > NBYTES * 3 // 4
        assert (array[5], array[-1], np.count_nonzero(array)) == (7, 8, 2)
        del array


def test_less_than_a_page_is_left_alone() -> None:
    array = np.zeros(100, np.uint8)
    touch_beside(array, "a test").join()
    assert not array.any()
