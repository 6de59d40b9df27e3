"""The page pool: who owns a page, what is shared, which rollouts wait, and that all of them end."""

import collections
import random

import pytest

from opsd_jax.rollout.pages import PagePool, PoolSizes

PAGE = 4


def pool(slots=4, shards=1, pages=16, width=4):
    return PagePool(PoolSizes(slots, shards, pages, width, PAGE))


def start(pool, tokens, longest=16, prompt=None, shared=0):
    return pool.start(tokens, longest, prompt=prompt, shared=shared)


def test_a_rollout_gets_pages_as_it_grows():
    one = PagePool(PoolSizes(2, 1, 8, 4, PAGE))
    slot = start(one, 5)
    assert (one.table[slot] < 8).tolist() == [True, True, False, False]
    before = one.table[slot, :2].tolist()
    assert one.reserve({slot: 9}) == []
    assert one.table[slot, :2].tolist() == before
    assert (one.table[slot] < 8).tolist() == [True, True, True, False]
    one.free(slot)
    assert (one.table == 8).all()


def test_rollouts_of_a_prompt_share_the_pages_that_it_fills():
    """The prompt has 9 tokens in the cache: two full pages, and one that each rollout has."""
    this = pool(slots=3, pages=12)
    slots = [start(this, 12, prompt="a", shared=9) for _ in range(3)]
    first, second, third = (this.table[slot].tolist() for slot in slots)
    assert first[:2] == second[:2] == third[:2]
    assert len({first[2], second[2], third[2], *first[:2]}) == 5
    this.free(slots[0])
    this.free(slots[2])
    other = start(this, 16, prompt="b", shared=9)
    assert not set(this.table[other].tolist()) & set(second[:3])
    this.free(slots[1])
    again = start(this, 12, prompt="a", shared=9)  # the pages were free: it gets others or the same
    assert set(this.table[again, :3].tolist()).isdisjoint(this.table[other].tolist())


def test_a_rollout_waits_for_pages_of_the_others():
    """A start leaves one page for each rollout that can still grow."""
    this = pool(slots=4, pages=6)
    assert start(this, 8) == 0
    assert start(this, 13) is None  # all 4 free pages, but one is left for the first rollout
    assert start(this, 12) == 1
    this = pool(slots=4, pages=6)
    assert start(this, 8, longest=8) == 0  # it cannot grow
    assert start(this, 16) == 1
    assert start(this, 1) is None


def test_the_rollout_that_started_last_is_preempted():
    this = pool(slots=4, pages=7)
    slots = [start(this, 4) for _ in range(3)]
    assert this.reserve({slots[0]: 8, slots[1]: 8, slots[2]: 4}) == []
    assert this.reserve({slots[0]: 12, slots[1]: 12, slots[2]: 4}) == []
    assert this.reserve({slots[0]: 16, slots[1]: 16, slots[2]: 4}) == [slots[1], slots[2]]
    assert (this.table[slots[0]] < 7).all()
    assert (this.table[slots[1:]] == 7).all()


def test_rollouts_of_a_prompt_meet_in_one_shard_and_others_spread():
    this = pool(slots=8, shards=2, pages=32)
    assert [this.shard(start(this, 8, prompt=p, shared=4)) for p in "abacbd"] == [0, 1, 0, 1, 1, 0]
    for slot in range(4):  # each shard has its own pages
        assert all(page < 16 or page == 32 for page in this.table[slot])
        assert all(page >= 16 for page in this.table[4 + slot])


def test_a_rollout_can_be_kept_out_of_shards():
    this = pool(slots=8, shards=2, pages=32)
    start_without = lambda *shards: this.start(8, 16, prompt="a", shared=4, without=shards)
    assert this.shard(start_without(0)) == 1
    assert this.shard(start_without(1)) == 0
    assert start_without(0, 1) is None


def test_a_cache_without_pages_has_room_in_every_slot():
    this = PagePool(PoolSizes(3))
    assert [start(this, 100, 900, "a", 50) for _ in range(4)] == [0, 1, 2, None]
    this.free(1)
    assert this.has_free_slot
    assert this.reserve({0: 200, 2: 900}) == []
    assert start(this, 5) == 1
    assert this.table.shape == (3, 0)


def test_a_full_pool_never_lets_a_rollout_wait():
    rng = random.Random(0)
    this, active = pool(slots=6, pages=24), {}
    for _ in range(500):
        active = {slot: min(n + rng.randint(1, 5), 16) for slot, n in active.items()}
        assert this.reserve(active) == []
        while this.has_free_slot:
            tokens = rng.randint(1, 16)
            active[start(this, tokens, prompt=rng.randint(0, 9), shared=0)] = tokens
        assert None not in active
        for slot in [slot for slot, n in active.items() if n == 16 or rng.random() < 0.2]:
            del active[slot]
            this.free(slot)


def test_a_shard_needs_pages_for_the_longest_rollout():
    with pytest.raises(ValueError, match="pages is 7; expected at least width x shards"):
        pool(slots=4, shards=2, pages=7)


class Rollout:
    def __init__(self, prompt, tokens, length, budget):
        self.prompt, self.tokens, self.length, self.budget = prompt, tokens, length, budget
        self.at, self.continues = tokens, False

    def needed(self, steps):
        return min(self.at + steps, self.tokens + self.budget)


def check(this, active, shards, pages):
    """Pages belong to one rollout each, except the full pages of a prompt."""
    per_shard, used = len(this.table) // shards, collections.defaultdict(list)
    for slot, rollout in active.items():
        own = [page for page in this.table[slot].tolist() if page < pages]
        assert len(set(own)) == len(own) >= -(-rollout.needed(4) // PAGE)
        shard = slot // per_shard
        assert all(shard * pages // shards <= p < (shard + 1) * pages // shards for p in own)
        for i, page in enumerate(own):
            used[page].append((i, rollout))
    for users in used.values():
        if len(users) > 1:
            places, rollouts = zip(*users, strict=True)
            assert len({*places}) == len({r.prompt for r in rollouts}) == 1
            assert all((places[0] + 1) * PAGE <= r.tokens for r in rollouts)  # nobody writes to it
            assert not any(r.continues for r in rollouts)
    empty = [slot for slot in range(len(this.table)) if slot not in active]
    assert (this.table[empty] == pages).all()


@pytest.mark.parametrize("seed", range(40))
def test_all_rollouts_end_in_any_workload(seed):
    """Random sizes, prompts and lengths; chunks end early. The pool often has too few pages."""
    rng = random.Random(seed)
    shards, width = rng.choice([1, 2, 4]), rng.randint(3, 9)
    slots, longest = shards * rng.randint(1, 6), width * PAGE
    pages = shards * rng.randint(width, 3 * width)
    this = PagePool(PoolSizes(slots, shards, pages, width, PAGE))
    waiting = collections.deque()
    for prompt in range(25):
        tokens = rng.randint(0, longest - 2)
        for _ in range(rng.randint(1, 5)):
            budget = rng.randint(1, longest - tokens)
            waiting.append(Rollout(prompt, tokens, rng.randint(1, budget), budget))
    count, ended, active = len(waiting), 0, {}
    for _ in range(10_000):
        for slot in reversed(this.reserve({slot: r.needed(4) for slot, r in active.items()})):
            rollout = active.pop(slot)
            rollout.continues = True
            waiting.appendleft(rollout)
        while waiting:
            first = waiting[0]
            shared = 0 if first.continues else first.tokens
            prompt = None if first.continues else first.prompt
            slot = this.start(
                first.needed(4), first.tokens + first.budget, prompt=prompt, shared=shared
            )
            if slot is None:
                break
            active[slot] = waiting.popleft()
        if not active:
            break
        check(this, active, shards, pages)
        steps = rng.randint(1, 4)
        for slot, rollout in list(active.items()):
            rollout.at += steps
            if rollout.at >= rollout.tokens + rollout.length:
                ended += 1
                this.free(slot)
                del active[slot]
    assert ended == count
    assert not waiting
    # All slots and pages are free again.
    room = shards * min(slots // shards, pages // shards // width)
    assert [start(this, longest, longest) is None for _ in range(room + 1)] == [False] * room + [
        True
    ]
