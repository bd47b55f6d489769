"""The global sample order: a pure function of (seed, position), whatever the ranks, micro-batches and restarts."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from common.sampler import GlobalOrder, RankBatches, epoch_order, generator_at, torch_seed_at

few = st.integers(1, 4)


def truth(n, seed, position, weights=None):
    """The definition, without any state: order(epoch p // n)[p % n]."""
    return int(epoch_order(n, seed, position // n, weights)[position % n])


def one_step(n, seed, world, batch, accumulation, start, steps, step, weights=None):
    """What all ranks together feed into optimizer step `step`."""
    out = []
    for rank in range(world):
        micro = list(RankBatches(GlobalOrder(n, seed, weights), batch, accumulation, rank, world, start, steps))
        assert len(micro) == steps * accumulation and all(len(b) == batch for b in micro)
        out += [pair for b in micro[step * accumulation : (step + 1) * accumulation] for pair in b]
    return out


@given(st.integers(1, 40), few, few, st.integers(1, 5), few, st.integers(0, 200), few, st.booleans())
def test_all_ranks_and_micro_batches_are_one_stream(n, seed, world, batch, accumulation, start, steps, weighted):
    weights = np.arange(1, n + 1) if weighted else None
    size = world * batch * accumulation
    for step in range(steps):
        pairs = one_step(n, seed, world, batch, accumulation, start, steps, step, weights)
        first = start + step * size
        assert sorted(p for p, _ in pairs) == list(range(first, first + size)), "every position exactly once"
        assert all(i == truth(n, seed, p, weights) for p, i in pairs)


def test_epochs_and_seeds_differ_and_repeat():
    orders = {(seed, epoch): tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(set(orders.values())) == 16
    assert orders[2, 3] == tuple(epoch_order(50, 2, 3)), "a function, not a state"
    assert tuple(range(50)) not in orders.values(), "shuffled"
    assert tuple(epoch_order(50, 1, 23)) != tuple(epoch_order(50, 12, 3)), "their digits do not run together"


@given(st.integers(1, 60), st.integers(0, 3), st.integers(0, 5), st.data())
def test_weighted_shares_are_floor_or_ceil_in_every_epoch(n, seed, epoch, data):
    weights = np.array(data.draw(st.lists(st.floats(1e-3, 1e3), min_size=n, max_size=n)))
    counts = np.bincount(epoch_order(n, seed, epoch, weights), minlength=n)
    share = n * weights / weights.sum()
    assert counts.sum() == n and len(counts) == n
    assert (counts >= np.floor(share - 1e-6)).all() and (counts <= np.ceil(share + 1e-6)).all()


def test_weighted_epochs_are_shuffled_and_together_leave_no_sample_out():
    weights = np.repeat([0.5, 5 / 6, 2.5], [500, 300, 200])
    orders = [epoch_order(1000, 5, epoch, weights) for epoch in range(12)]
    assert set(np.concatenate(orders)) == set(range(1000)) and np.abs(np.diff(orders[0])).mean() > 100


@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_generators_depend_on_seed_position_and_purpose_alone(seed, position):
    first, again = generator_at(seed, position, "augment").random(4), generator_at(seed, position, "augment").random(4)
    np.testing.assert_array_equal(first, again)
    keys = [(seed, position, "augment"), (seed, position, "noise"), (seed, position + 1, "augment")]
    assert len({generator_at(*key).random() for key in [*keys, (seed + 1, position, "augment")]}) == 4
    seeds = [torch_seed_at(seed, position + i, "dropout") for i in (0, 0, 1)]
    assert seeds[0] == seeds[1] != seeds[2] and 0 <= seeds[0] < 2**63


def test_the_order_is_the_one_of_earlier_versions():
    """A checkpoint resumes with the order it began with: a change here is a change of the checkpoint format."""
    assert epoch_order(10, 42, 0).tolist() == [3, 9, 2, 4, 6, 8, 0, 7, 5, 1]
    assert torch_seed_at(42, 7, "dropout") == 8270223534084020472
