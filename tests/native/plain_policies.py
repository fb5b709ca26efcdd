"""Plain versions of the policies' rules, for comparison: slow, and short enough to check by reading."""

import numpy as np

NUM_KEYS = 40
HALF_LIFE = 1.7
LAYERS = np.repeat(np.arange(8, dtype=np.int32), 5)
COSTS = np.linspace(0.5, 3, NUM_KEYS).astype(np.float32)


class PlainLRU:
    def __init__(self, num_slots):
        self.num_slots = num_slots
        self.time = 0
        self.used = {}  # cached key -> time of its last use

    def touch(self, key):
        self.time += 1
        self.used[key] = self.time

    def access(self, key, cached):
        if cached:
            self.touch(key)

    insert = touch

    def remove(self, key):
        del self.used[key]

    def order(self):
        """Cached keys, the one that should go first in front."""
        return sorted(self.used, key=self.used.get)


class PlainLayers(PlainLRU):
    share = 0.4

    def order(self):
        oldest = super().order()
        shallow = [key for key in oldest if LAYERS[key] < 2]
        deep = [key for key in oldest if LAYERS[key] >= 2]
        return shallow + deep if len(shallow) > int(self.share * self.num_slots) else deep + shallow


class PlainLFU:
    """Sums the weights of all past uses anew for each decision."""

    half_life = HALF_LIFE

    def __init__(self, num_slots):
        self.clock = 0
        self.uses = [[] for _ in range(NUM_KEYS)]
        self.cached = set()

    def access(self, key, cached):
        self.uses[key].append(self.clock)
        self.clock += 1

    def insert(self, key):
        self.cached.add(key)

    def remove(self, key):
        self.cached.remove(key)

    def count(self, key):
        if self.half_life == 0:
            return max(self.uses[key], default=-1)
        return sum(0.5 ** ((self.clock - use) / (self.half_life * NUM_KEYS)) for use in self.uses[key])

    def order(self):
        return sorted(self.cached, key=lambda key: (self.count(key), key))


class PlainLRFU:
    """Each half-life counts all uses anew and keeps a shadow as a set; the best of late decides."""

    half_lives = (0, 0.3, 1, 3, 12)

    def __init__(self, num_slots):
        self.num_slots = num_slots
        self.judges = [PlainLFU(num_slots) for _ in self.half_lives]
        for judge, half_life in zip(self.judges, self.half_lives, strict=True):
            judge.half_life = half_life
        self.hits = [0.0] * len(self.half_lives)
        self.leader = 2
        self.leaders = set()
        self.cached = set()

    def access(self, key, cached):
        for n, judge in enumerate(self.judges):
            judge.access(key, None)
            hit = key in judge.cached
            self.hits[n] = self.hits[n] * (1 - np.log(2) / (4 * NUM_KEYS)) + hit
            if not hit and len(judge.cached) == self.num_slots:
                judge.remove(judge.order()[0])
            judge.insert(key)
        best = max(range(len(self.hits)), key=lambda n: (self.hits[n], n == self.leader, -n))
        if self.hits[best] > self.hits[self.leader] * 1.003:
            self.leader = best
        self.leaders.add(self.leader)

    insert = PlainLFU.insert
    remove = PlainLFU.remove

    def order(self):
        judge = self.judges[self.leader]
        return sorted(self.cached, key=lambda key: (judge.count(key), key))


class PlainGDSF:
    def __init__(self, num_slots):
        self.floor = 0.0
        self.missed = set()
        self.uses, self.priority = {}, {}

    def rate(self, key):
        self.priority[key] = self.floor + self.uses[key] * float(COSTS[key])

    def access(self, key, cached):
        if cached:
            self.uses[key] += 1
            self.rate(key)
        else:
            self.missed.add(key)

    def insert(self, key):
        self.uses[key] = int(key in self.missed)
        self.missed.discard(key)
        self.rate(key)

    def remove(self, key):
        self.floor = max(self.floor, self.priority.pop(key))

    def order(self):
        return sorted(self.priority, key=lambda key: (self.priority[key], key))


class PlainARC:
    """The lists of the paper as Python lists, the oldest key in front."""

    def __init__(self, num_slots):
        self.c = num_slots
        self.p = 0.0
        self.t1, self.t2, self.b1, self.b2 = [], [], [], []
        self.missed, self.returned = set(), set()
        self.adapted = set()

    def access(self, key, cached):
        if cached:
            (self.t1 if key in self.t1 else self.t2).remove(key)
            self.t2.append(key)
            return
        self.missed.add(key)
        if key in self.b1:
            self.p = min(self.c, self.p + max(1, len(self.b2) / len(self.b1)))
            self.b1.remove(key)
            self.returned.add(key)
            self.adapted.add("up")
        elif key in self.b2:
            self.p = max(0, self.p - max(1, len(self.b1) / len(self.b2)))
            self.b2.remove(key)
            self.returned.add(key)
            self.adapted.add("down")

    def insert(self, key):
        again = key in self.returned
        if key not in self.missed:  # read ahead
            for ghosts in (self.b1, self.b2):
                if key in ghosts:
                    ghosts.remove(key)
                    again = True
        self.missed.discard(key)
        self.returned.discard(key)
        (self.t2 if again else self.t1).append(key)
        while self.b1 and len(self.t1) + len(self.b1) > self.c:
            self.b1.pop(0)
        while self.b2 and len(self.t1 + self.t2 + self.b1 + self.b2) > 2 * self.c:
            self.b2.pop(0)

    def remove(self, key):
        cached, ghosts = (self.t1, self.b1) if key in self.t1 else (self.t2, self.b2)
        cached.remove(key)
        ghosts.append(key)

    def order(self):
        return self.t1 + self.t2 if self.t1 and len(self.t1) >= self.p else self.t2 + self.t1


PLAIN = {
    "lrfu": PlainLRFU,
    "lru": PlainLRU,
    "lfu": PlainLFU,
    "arc": PlainARC,
    "layers": PlainLayers,
    "gdsf": PlainGDSF,
}
