"""Every KV page is free, or held by as many as say so; what cannot be had changes nothing."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numoe.engine.errors import ResourceError
from numoe.engine.kv import PAGE_TOKENS, PageAllocator, PageTable, pages_for


@pytest.mark.parametrize(
    ("tokens", "pages"), [(0, 0), (1, 1), (PAGE_TOKENS, 1), (PAGE_TOKENS + 1, 2), (10 * PAGE_TOKENS, 10)]
)
def test_pages_for_rounds_up(tokens, pages):
    assert pages_for(tokens) == pages


# --- PageAllocator --------------------------------------------------------------------------------


def test_a_new_allocator_has_every_page_free():
    allocator = PageAllocator(5)
    assert (allocator.n_pages, allocator.n_free, allocator.n_used) == (5, 5, 0)
    assert sorted(allocator.allocate(5)) == [0, 1, 2, 3, 4]
    assert (allocator.n_free, allocator.n_used) == (0, 5)


@pytest.mark.parametrize("n_pages", [0, -1])
def test_a_cache_without_pages_is_refused(n_pages):
    with pytest.raises(ResourceError, match="at least one"):
        PageAllocator(n_pages)


def test_allocation_is_all_or_nothing():
    allocator = PageAllocator(4)
    allocator.allocate(2)
    with pytest.raises(ResourceError, match="2 of 4 pages free and 3 are needed"):
        allocator.allocate(3)
    assert allocator.n_free == 2
    assert len(allocator.allocate(2)) == 2


def test_allocating_nothing_works_in_a_full_cache():
    allocator = PageAllocator(1)
    allocator.allocate(1)
    assert allocator.allocate(0) == []


def test_a_shared_page_is_free_when_its_last_holder_lets_go():
    allocator = PageAllocator(2)
    pages = allocator.allocate(1)
    allocator.share(pages)
    assert allocator.references(pages[0]) == 2
    assert allocator.n_used == 1
    allocator.free(pages)
    assert allocator.n_used == 1
    allocator.free(pages)
    assert (allocator.references(pages[0]), allocator.n_used) == (0, 0)


@pytest.mark.parametrize("page", [1, 2, -1], ids=["free", "beyond the last", "negative"])
def test_only_held_pages_can_be_shared_or_freed(page):
    allocator = PageAllocator(2)
    assert allocator.allocate(1) == [0]
    with pytest.raises(RuntimeError, match=f"page {page} is not held"):
        allocator.share([0, page])
    with pytest.raises(RuntimeError, match=f"page {page} is not held"):
        allocator.free([0, page])
    assert allocator.references(0) == 1, "a refused call changes nothing"
    allocator.check_integrity()


def test_a_page_cannot_be_freed_more_often_than_it_is_held():
    allocator = PageAllocator(2)
    (page,) = allocator.allocate(1)
    allocator.share([page])
    with pytest.raises(RuntimeError, match="not held by 3"):
        allocator.free([page, page, page])
    assert allocator.references(page) == 2
    allocator.free([page, page])
    assert allocator.n_free == 2


def test_integrity_check_finds_each_kind_of_damage():
    def damaged(damage):
        allocator = PageAllocator(3)
        allocator.allocate(1)
        damage(allocator)
        return allocator

    with pytest.raises(RuntimeError, match="twice"):
        damaged(lambda a: a._free.append(a._free[0])).check_integrity()
    with pytest.raises(RuntimeError, match="is free and has 1"):
        damaged(lambda a: a._free.append(0)).check_integrity()
    with pytest.raises(RuntimeError, match="do not make 3"):
        damaged(lambda a: a._free.pop()).check_integrity()


def test_a_page_is_withdrawn_only_when_nobody_else_needs_it():
    allocator = PageAllocator(2, saves=True)
    pages = allocator.allocate(1)
    allocator.publish(pages[0], b"key", 10)
    assert not allocator.withdraw(pages[0]), "it is to be saved"
    allocator.mark_saved(b"key")
    allocator.share(pages)
    assert not allocator.withdraw(pages[0]), "others hold it"
    allocator.free(pages)
    allocator.begin_read(b"key")
    assert not allocator.withdraw(pages[0]), "it is read"
    allocator.end_read(pages)
    assert b"key" in allocator
    assert allocator.withdraw(pages[0])
    assert b"key" not in allocator
    allocator.publish(pages[0], b"other")
    assert allocator.tokens_of(b"other") == PAGE_TOKENS
    allocator.check_integrity()


@given(
    n_pages=st.integers(1, 8),
    calls=st.lists(st.tuples(st.sampled_from(["allocate", "share", "free"]), st.integers(0, 8)), max_size=40),
)
def test_references_are_what_the_calls_add_up_to(n_pages, calls):
    allocator, held = PageAllocator(n_pages), Counter()
    for call, number in calls:
        if call == "allocate" and number <= n_pages - len(held):
            pages = allocator.allocate(number)
            assert not set(pages) & set(held), "a page that somebody holds was given away"
            held.update(pages)
        elif call == "allocate":
            with pytest.raises(ResourceError):
                allocator.allocate(number)
        elif held:
            page = sorted(held)[number % len(held)]
            getattr(allocator, call)([page])
            held[page] += 1 if call == "share" else -1
            held += Counter()  # drops what nobody holds
        allocator.check_integrity()
        assert [allocator.references(page) for page in range(n_pages)] == [held[page] for page in range(n_pages)]
        assert allocator.n_used == len(held)
        assert allocator.n_free == n_pages - len(held)


# --- PageTable ------------------------------------------------------------------------------------


def test_a_table_takes_pages_only_when_the_ones_it_has_are_full():
    allocator = PageAllocator(3)
    table = PageTable(allocator)
    assert (table.pages, table.capacity, table.missing(1)) == ([], 0, 1)
    table.ensure(1)
    first = list(table.pages)
    table.ensure(PAGE_TOKENS)
    assert table.pages == first
    table.ensure(PAGE_TOKENS + 1)
    assert table.pages[:1] == first, "tokens stay where they are"
    assert (len(table.pages), table.capacity, allocator.n_used) == (2, 2 * PAGE_TOKENS, 2)
    table.ensure(1)
    assert len(table.pages) == 2, "room is not given back piecemeal"


def test_a_table_that_finds_too_few_pages_is_unchanged():
    allocator = PageAllocator(3)
    table, other = PageTable(allocator), PageTable(allocator)
    table.ensure(1)
    other.ensure(1)
    before = list(table.pages)
    with pytest.raises(ResourceError):
        table.ensure(3 * PAGE_TOKENS)
    assert table.pages == before
    assert allocator.n_free == 1


def test_a_released_table_is_empty_and_can_be_used_again():
    allocator = PageAllocator(2)
    table = PageTable(allocator)
    table.ensure(2 * PAGE_TOKENS)
    table.release()
    assert (table.pages, table.capacity, allocator.n_used) == ([], 0, 0)
    table.release()
    table.ensure(PAGE_TOKENS)
    assert allocator.n_used == 1
    allocator.check_integrity()


def test_releasing_a_table_leaves_shared_pages_to_the_other_holder():
    allocator = PageAllocator(2)
    table = PageTable(allocator)
    table.ensure(1)
    (page,) = table.pages
    allocator.share([page])
    table.release()
    assert allocator.references(page) == 1


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6 * PAGE_TOKENS) | st.none()), max_size=30))
def test_tables_never_name_the_same_page(calls):
    allocator = PageAllocator(8)
    tables = [PageTable(allocator) for _ in range(3)]
    for which, tokens in calls:
        table, before = tables[which], list(tables[which].pages)
        if tokens is None:
            table.release()
        elif table.missing(tokens) <= allocator.n_free:
            table.ensure(tokens)
            assert table.pages[: len(before)] == before
            assert table.capacity >= tokens
        else:
            with pytest.raises(ResourceError):
                table.ensure(tokens)
            assert table.pages == before
        named = [page for table in tables for page in table.pages]
        assert len(set(named)) == len(named) == allocator.n_used
        allocator.check_integrity()


def test_what_is_foreign_is_so_while_its_page_is_found() -> None:
    pages = PageAllocator(2)
    first, second = pages.allocate(2)
    pages.publish(first, b"foreign", foreign=True)
    pages.publish(second, b"own")
    pages.publish(second, b"foreign", foreign=True)  # has a page already, which stays what it was
    assert [pages.is_foreign(key) for key in (b"foreign", b"own", b"unknown")] == [True, False, False]
    assert pages.withdraw(first)
    pages.publish(first, b"foreign")
    assert not pages.is_foreign(b"foreign")
    pages.withdraw(second)
    pages.publish(second, b"again", foreign=True)
    pages.free([first, second])
    pages.allocate(2)
    assert not pages.is_foreign(b"again")
