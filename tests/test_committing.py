"""Blocks on their way to the disk: groups, errors, what is kept in memory, and no thread left."""

import threading
import time
import weakref

import pytest

from wsi_pipeline import committing
from wsi_pipeline.committing import Writers

LONG = 20
"""Seconds after which a test that waits has failed; none waits that long otherwise."""


class Block:
    """Weakly referable."""

    def __init__(self, number):
        self.number = number


class Books:
    """Notes what is written and committed; a commit may be made to wait, or to fail."""

    def __init__(self):
        self.written = []
        self.groups = []
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        self.fail_at = None
        self.threads = set()

    def write(self, block):
        self.written.append(block.number)
        return block.number

    def commit(self, group, threads):
        self.threads.add(threads)
        self.begun.set()
        assert self.go_on.wait(LONG)
        if self.fail_at is not None and len(self.groups) >= self.fail_at:
            raise OSError(28, "No space left on device")
        self.groups.append(sorted(group))

    @property
    def committed(self):
        return sorted(number for group in self.groups for number in group)


def hand(writers, numbers):
    with writers:
        for number in numbers:
            writers.hand(Block(number))


def until(condition):
    for _ in range(LONG * 1000):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("waited in vain")


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture
def books():
    return Books()


def test_what_is_written_while_the_disk_is_busy_is_committed_together(books):
    books.go_on.clear()
    with Writers(books.write, books.commit, threads=2) as writers:
        writers.hand(Block(0))
        assert books.begun.wait(LONG)
        for number in range(1, 9):
            writers.hand(Block(number))
        until(lambda: len(writers._written) == 8)
        books.go_on.set()
    assert books.groups == [[0], [*range(1, 9)]]
    assert len(books.threads) == 1, "the same threads sync all groups"


def test_a_lone_block_waits_for_no_other(books):
    with Writers(books.write, books.commit, threads=1) as writers:
        for number in range(3):
            writers.hand(Block(number))
            until(lambda number=number: number in books.committed)
    assert books.groups == [[0], [1], [2]]


@pytest.mark.parametrize("threads", [1, 4])
def test_each_block_is_written_and_committed_once(books, threads):
    with Writers(books.write, books.commit, threads=threads) as writers:
        for number in range(100):
            writers.hand(Block(number))
    assert sorted(books.written) == books.committed == [*range(100)]


def test_the_disk_holds_up_nobody_until_it_is_far_behind(books, monkeypatch):
    monkeypatch.setattr(committing, "MOST_WRITTEN", 3)
    books.go_on.clear()
    threads, handed = 2, []
    with Writers(books.write, books.commit, threads=threads) as writers:
        writers.hand(Block(0))
        assert books.begun.wait(LONG)

        def network():
            for number in range(1, 20):
                writers.hand(Block(number))
                handed.append(number)

        other = threading.Thread(target=network)
        other.start()
        # one with the disk, two that wait for it, two with the writers that cannot pass them on
        until(lambda: len(books.written) == 3 + threads)
        until(lambda: len(handed) == 2 + threads + 1)
        time.sleep(0.05)
        assert len(books.written) == 3 + threads
        assert len(handed) == 2 + threads + 1, "one more waits for a writer"
        books.go_on.set()
        other.join()
    assert books.committed == [*range(20)]
    assert max(map(len, books.groups)) <= 3


def test_blocks_that_wait_for_the_disk_keep_no_pixels(books):
    books.go_on.clear()
    with Writers(books.write, books.commit, threads=1) as writers:
        blocks = [Block(number) for number in range(10)]
        seen = [weakref.ref(block) for block in blocks]
        while blocks:
            writers.hand(blocks.pop())
        until(lambda: len(books.written) == 10)
        until(lambda: sum(each() is not None for each in seen) <= 1)
        assert not books.groups
        books.go_on.set()


def test_a_block_that_fails_takes_no_other_along(books):
    def write(block):
        if block.number == 2:
            raise ValueError("not this one")
        return books.write(block)

    with pytest.raises(ValueError, match="not this one"):
        hand(Writers(write, books.commit, threads=1), range(4))
    assert {0, 1} <= set(books.committed)
    assert sorted(books.written) == books.committed


@pytest.mark.parametrize("count", [3, 1000], ids=["at the end", "while blocks come"])
def test_a_commit_that_fails_is_told_and_ends_the_writing(books, count):
    books.fail_at = 1

    def numbers():
        for number in range(count):
            yield number
            if number == 0:
                until(lambda: books.groups)

    with pytest.raises(OSError, match="No space left"):
        hand(Writers(books.write, books.commit, threads=2), numbers())
    assert books.groups == [[0]]
    assert len(books.written) < 1000


def test_who_waits_for_room_hears_of_a_commit_that_fails(books, monkeypatch):
    monkeypatch.setattr(committing, "MOST_WRITTEN", 2)
    books.fail_at = 0
    books.go_on.clear()

    def numbers():
        yield 0
        assert books.begun.wait(LONG)
        yield from (1, 2)  # one waits for the disk, one with the writer
        until(lambda: len(books.written) == 3)
        books.go_on.set()

    with pytest.raises(OSError, match="No space left"):
        hand(Writers(books.write, books.commit, threads=1), numbers())


def test_what_was_handed_over_is_committed_when_its_giver_fails(books):
    books.go_on.clear()

    def numbers():
        yield from range(4)
        books.go_on.set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hand(Writers(books.write, books.commit, threads=2), numbers())
    assert books.committed == [0, 1, 2, 3]


def test_a_wish_to_end_is_told_rather_than_a_commit_that_fails(books):
    books.fail_at = 0

    def numbers():
        yield 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hand(Writers(books.write, books.commit, threads=1), numbers())
    assert books.committed == []


def test_no_block_no_commit(books):
    with Writers(books.write, books.commit, threads=2):
        pass
    assert not books.begun.is_set()
