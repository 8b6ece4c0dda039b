"""KV pages: which page of the cache holds which tokens of which sequence."""

from numoe.engine.kv.pages import PAGE_TOKENS, PageAllocator, PageTable, pages_for

__all__ = ["PAGE_TOKENS", "PageAllocator", "PageTable", "pages_for"]
