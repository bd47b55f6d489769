"""One global sample order: a pure function of (seed, position), the same for any number of ranks, workers and restarts.

Position p counts the samples that training has consumed since step 0, over all ranks. The sample at p is
epoch_order(n, seed, p // n)[p % n]. An optimizer step takes `global_batch` consecutive positions, and every micro-batch
of every rank its own slice of them: together they are exactly one big batch."""

import hashlib

import numpy as np


def epoch_order(n, seed, epoch, weights=None):
    """-> (n,) int64, the samples of one epoch in order. Without weights a permutation; with `weights` (n,) > 0, n draws
    in which sample i occurs floor or ceil of n * w_i / sum(w) times (systematic resampling), so that the shares are
    right in every epoch."""
    rng = generator_at(seed, epoch, "order")
    if weights is None:
        return rng.permutation(n)
    edges = np.cumsum(weights, dtype=np.float64)
    points = (np.arange(n) + rng.random()) * (edges[-1] / n)
    return rng.permutation(np.minimum(np.searchsorted(edges, points, side="right"), n - 1))


class GlobalOrder:
    """index(position) over endless epochs of `n` samples."""

    def __init__(self, n, seed, weights=None):
        self.n, self.seed, self.weights, self._epoch, self._order = n, seed, weights, None, None

    def index(self, position):
        epoch, offset = divmod(position, self.n)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self.n, self.seed, epoch, self.weights)
        return int(self._order[offset])


class RankBatches:
    """Batch sampler of one rank: yields micro-batches, lists of (position, index), `accumulation` of them per optimizer
    step. `start`: the first position, where a resumed run stopped; `steps`: how many optimizer steps."""

    def __init__(self, order, batch_size, accumulation=1, rank=0, world=1, start=0, steps=1):
        self.order, self.batch_size, self.accumulation, self.steps = order, batch_size, accumulation, steps
        self.rank, self.world, self.start = rank, world, start

    def __iter__(self):
        for k in range(len(self)):
            first = self.start + (k * self.world + self.rank) * self.batch_size
            yield [(p, self.order.index(p)) for p in range(first, first + self.batch_size)]

    def __len__(self):
        return self.steps * self.accumulation


def torch_seed_at(seed, position, purpose):
    """-> 63-bit seed for torch.manual_seed or torch.Generator, for the random choices at one position. `purpose`
    ("augment", "noise", ...) keeps their streams apart."""
    return _key(seed, position, purpose) & (2**63 - 1)


def generator_at(seed, position, purpose):
    """-> a NumPy generator, seeded in the same way."""
    return np.random.Generator(np.random.Philox(_key(seed, position, purpose)))


def _key(seed, number, purpose):
    digest = hashlib.blake2b(f"{seed}/{number}/{purpose}".encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")
