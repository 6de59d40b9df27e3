"""The page pool of a rollout engine: which slot a rollout gets, and which pages of the cache.

A rollout draws pages as it grows. The pool decides on the host, from the lengths of the rollouts
alone, so every host decides the same. With a mesh, each shard of the rows has its own slots and its
own equal part of the pages. Three rules apply in each shard:

- **Growth.** Before each chunk of decoding steps, every rollout gets pages for all positions that
  the chunk can reach, the rollout that started first before the others. If no page is free, the
  rollout that started last is preempted: its slot and its pages become free.
- **Start.** A rollout starts if a slot is free, and if the free pages are enough for its prompt,
  for its first chunk, and for one more page of every rollout in the shard that can still grow.
  Rollouts start in the order of the queue. The queue begins with the preempted rollouts.
- **Sharing.** Rollouts of one prompt in the same shard share the pages that the prompt fills. These
  pages become free with the last of the rollouts.

These rules cannot deadlock. A shard has at least as many pages as the longest rollout needs. The
rollout that started first is never preempted: when it needs a page and none is free, the preemption
of all others frees all pages but its own. Every chunk therefore adds tokens to it until it ends,
and then the next one is the first. If no rollout is in a slot, all pages are free, so the first in
the queue starts.

A cache without pages is a pool in which a rollout needs no page.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from opsd_jax.policy import PagedCache, Policy


class PoolSizes(NamedTuple):
    """The sizes of a `PagePool`. The default values are those of a cache without pages.

    Attributes:
      slots: number of decoding slots, a multiple of `shards`.
      shards: number of parts of the rows, each with its own slots and pages.
      pages: number of pages, a multiple of `shards`.
      width: pages of the longest rollout.
      page: tokens per page.
    """

    slots: int
    shards: int = 1
    pages: int = 0
    width: int = 0
    page: int = 1

    @property
    def is_full(self) -> bool:
        """Whether there are pages for the longest rollout in every slot."""
        return self.pages >= self.slots * self.width

    @property
    def tokens(self) -> int:
        """The number of tokens for which there are pages."""
        return self.pages * self.page


def pool_sizes(
    policy: Policy, *, slots: int, length: int, shards: int, pool_tokens: int
) -> PoolSizes:
    """Computes the sizes of the pool for a model.

    Args:
      policy: the model.
      slots: number of decoding slots.
      length: cache length of the longest rollout, in tokens.
      shards: number of parts that the mesh splits rows into.
      pool_tokens: number of tokens in the pool, over all devices. It is rounded down to whole pages
        in each shard. 0, or a number above slots x length, gives every slot all its pages.

    Raises:
      ValueError: the pool is too small for one rollout, or the model's cache has no pages.
    """
    cache = jax.eval_shape(lambda: policy.init_cache(slots, length))
    if not isinstance(cache, PagedCache):
        if pool_tokens:
            raise ValueError(
                f"pool_tokens is {pool_tokens}; expected 0, because the model's cache has no "
                "pages. The decoder has a paged cache on TPUs: see model.cache."
            )
        return PoolSizes(slots)
    all_pages, page = jax.tree.leaves(cache.pages)[0].shape[:2]
    width = cache.table.shape[1]
    pages = min(all_pages, pool_tokens // (page * shards) * shards) if pool_tokens else all_pages
    if pages < width * shards:
        raise ValueError(
            f"pool_tokens is {pool_tokens}; expected at least {width * page * shards}, or 0 for "
            f"a full cache. A rollout of {length} tokens takes {width} pages of {page} tokens, and "
            f"each of the {shards} parts of decode_mesh along data and fsdp needs room for one."
        )
    return PoolSizes(slots, shards, pages, width, page)


class _Tenant(NamedTuple):
    """A rollout in a slot.

    Attributes:
      pages: its pages in order; the list grows.
      most: number of pages at its full length.
      prompt: identifies its prompt.
    """

    pages: list[int]
    most: int
    prompt: Hashable


class _Shard:
    """The slots and the pages of one shard.

    Attributes:
      slots: the free slots, as a heap.
      pages: the free pages.
      tenants: slot -> its rollout; the rollout that started first comes first.
      prompts: prompt -> the pages that it fills, while a rollout uses them.
      users: page -> number of rollouts that use it.
    """

    def __init__(self, slots: range, pages: range):
        self.slots, self.pages = list(slots), list(reversed(pages))
        self.tenants: dict[int, _Tenant] = {}
        self.prompts: dict[Hashable, list[int]] = {}
        self.users: Counter[int] = Counter()

    def left(self, count: int, prompt: Hashable) -> int:
        """Returns how many pages would be free if a rollout started with `count` pages.

        Pages that the rollouts in the shard will need are not counted: one for each rollout that
        can still grow. So the result may be negative.
        """
        growing = sum(len(tenant.pages) < tenant.most for tenant in self.tenants.values())
        return len(self.pages) - growing - (count - len(self.prompts.get(prompt, ())))

    def start(self, count: int, most: int, prompt: Hashable, full: int) -> int:
        """Gives the first free slot and `count` pages to a rollout, and returns the slot.

        Args:
          count: number of pages, including those of the prompt.
          most: number of pages at the rollout's full length.
          prompt: identifies the prompt.
          full: number of pages that the prompt fills.
        """
        slot = heapq.heappop(self.slots)
        pages = list(self.prompts.get(prompt, ()))
        self.users.update(pages)
        self.tenants[slot] = _Tenant(pages, most, prompt)
        self.grow(slot, count)
        if full:
            self.prompts[prompt] = pages[:full]
        return slot

    def grow(self, slot: int, count: int) -> bool:
        """Gives free pages to a slot until it has `count`. Returns False if too few are free."""
        pages = self.tenants[slot].pages
        missing = count - len(pages)
        if missing > len(self.pages):
            return False
        new = [self.pages.pop() for _ in range(missing)]
        self.users.update(new)
        pages += new
        return True

    def free(self, slot: int) -> None:
        """Frees a slot, and the pages that no other slot uses."""
        pages, _, prompt = self.tenants.pop(slot)
        heapq.heappush(self.slots, slot)
        self.users.subtract(pages)
        unused = [page for page in pages if not self.users[page]]
        self.pages += reversed(unused)
        if prompt in self.prompts and self.prompts[prompt][0] in unused:
            del self.prompts[prompt]


class PagePool:
    """The slots of an engine and the pages of its cache.

    Attributes:
      table: int32 [slots, width], the pages of each slot; the number of pages stands for no page.
        See `opsd_jax.policy.PagedCache`.
    """

    def __init__(self, sizes: PoolSizes):
        """Creates a pool in which every slot and every page is free.

        Raises:
          ValueError: a shard has fewer pages than the longest rollout needs.
        """
        slots, shards, pages, width, page = sizes
        if pages < width * shards:
            raise ValueError(f"pages is {pages}; expected at least width x shards in {sizes}.")
        self.table = np.full((slots, width), pages, np.int32)
        self._page, self._none, self._per_shard = page, pages, slots // shards
        part = lambda count, i: range(i * count // shards, (i + 1) * count // shards)
        self._shards = [_Shard(part(slots, i), part(pages, i)) for i in range(shards)]

    @property
    def has_free_slot(self) -> bool:
        """Whether any slot is free."""
        return any(shard.slots for shard in self._shards)

    @property
    def has_pages(self) -> bool:
        """Whether the cache has pages."""
        return self._none > 0

    def shard(self, slot: int) -> int:
        """Returns the shard of a slot."""
        return slot // self._per_shard

    def start(
        self,
        length: int,
        longest: int,
        *,
        prompt: Hashable,
        shared: int,
        without: Sequence[int] = (),
    ) -> int | None:
        """Gives a slot and pages to a rollout. Returns the slot; None if the rollout has to wait.

        The rollout goes to a shard that has the pages of its prompt, or else to the shard with the
        most free pages.

        Args:
          length: cache length that the rollout needs for its next chunk, in tokens.
          longest: cache length that it can need at most.
          prompt: identifies the prompt. Rollouts of equal prompts share pages.
          shared: number of tokens that the rollout has in common with the others of its prompt.
          without: shards in which the rollout must not start.
        """
        count, best = self._count(length), None
        for i, shard in enumerate(self._shards):
            left = shard.left(count, prompt)
            if shard.slots and left >= 0 and i not in without:
                key = prompt in shard.prompts, left, -i
                best = key if best is None else max(best, key)
        if best is None:
            return None
        full = min(shared // self._page, count)
        slot = self._shards[-best[2]].start(count, self._count(longest), prompt, full)
        self._set(slot)
        return slot

    def reserve(self, lengths: Mapping[int, int]) -> list[int]:
        """Gives every rollout in a slot pages for its next chunk, and preempts some if it has to.

        Args:
          lengths: slot -> cache length that its rollout needs, in tokens.

        Returns:
          The slots of the preempted rollouts, which are free now. In each shard, the rollout that
          started first comes first.
        """
        preempted: list[int] = []
        for shard in self._shards:
            last: list[int] = []
            for slot in list(shard.tenants):
                while slot in shard.tenants and not shard.grow(slot, self._count(lengths[slot])):
                    last.append(next(reversed(shard.tenants)))
                    self.free(last[-1])
                if slot in shard.tenants:
                    self._set(slot)
            preempted += reversed(last)
        return preempted

    def free(self, slot: int) -> None:
        """Frees a slot, and the pages that no other slot uses."""
        self._shards[self.shard(slot)].free(slot)
        self.table[slot] = self._none

    def _count(self, length: int) -> int:
        """Returns the number of pages for `length` tokens; 0 for a cache without pages."""
        return min(-(-length // self._page), self.table.shape[1])

    def _set(self, slot: int) -> None:
        """Writes the pages of a slot to the table."""
        pages = self._shards[self.shard(slot)].tenants[slot].pages
        self.table[slot, : len(pages)] = pages
