/* "lrfu": between the last use and all uses (Lee et al., IEEE Transactions on Computers 50(12), 2001), the place
   between them found while running.

   How long a use should count depends on the model and the text: an expert that the last token used is likely to be
   used again, or its popularity over hundreds of tokens says more. So several half-lives each keep a shadow of the
   cache, keys without data, as if theirs alone decided; the one with the most hits of late decides for the cache. */
#include "policy_counts.h"

/* See policy_counts.h; 0 is LRU, and the last counts nearly all uses of a conversation. Chosen, as the two numbers
   below, by replaying skewed, changing and recurrent routing (tests/test_experts_replay.py). */
static const double half_lives[] = {0, 0.3, 1, 3, 12};
enum { NUM_JUDGES = sizeof half_lives / sizeof *half_lives, FIRST_LEADER = 2 };

/* A hit in a shadow counts half after this many uses for each key. */
#define HITS_HALF_LIFE 4
/* The share by which another half-life must be better to take over: many are alike, and a change costs misses. */
#define LEAD 0.003

typedef struct {
    policy base;
    uint32_t num_slots;
    aged_counts judges[NUM_JUDGES]; /* each heap holds the shadow */
    double hits[NUM_JUDGES];        /* of the shadows, of late */
    double forgetting;              /* what is left of a hit after one use */
    uint32_t leader;
    policy_heap cached; /* the leader's counts of what is cached */
} lrfu;

static void lrfu_destroy(policy *p)
{
    lrfu *self = (lrfu *)p;
    for (uint32_t n = 0; n < NUM_JUDGES; n++)
        counts_destroy(&self->judges[n]);
    heap_destroy(&self->cached);
    free(self);
}

static policy *lrfu_create(uint32_t num_keys, uint32_t num_slots, const policy_options *options)
{
    (void)options;
    lrfu *self = calloc(1, sizeof *self);
    if (self == NULL)
        return NULL;
    bool created = heap_create(&self->cached, num_keys);
    for (uint32_t n = 0; n < NUM_JUDGES; n++)
        created = counts_create(&self->judges[n], num_keys, half_lives[n]) && created;
    if (!created) {
        lrfu_destroy(&self->base);
        return NULL;
    }
    self->num_slots = num_slots;
    self->forgetting = 1 - 0.693147180559945309417 / (HITS_HALF_LIFE * (double)num_keys);
    self->leader = FIRST_LEADER;
    return &self->base;
}

/* One access in the shadow. True for a hit. */
static bool judge(policy_heap *shadow, uint32_t key, uint32_t num_slots)
{
    if (heap_holds(shadow, key))
        return true;
    if (shadow->length == num_slots)
        heap_remove(shadow, heap_lowest(shadow, NULL, NULL));
    heap_insert(shadow, key);
    return false;
}

static void follow_the_best(lrfu *self)
{
    uint32_t best = self->leader;
    for (uint32_t n = 0; n < NUM_JUDGES; n++)
        if (self->hits[n] > self->hits[best])
            best = n;
    if (self->hits[best] <= self->hits[self->leader] * (1 + LEAD))
        return;
    self->leader = best;
    heap_copy_scores(&self->cached, &self->judges[best].heap);
}

static void lrfu_access(policy *p, uint32_t key, bool cached)
{
    lrfu *self = (lrfu *)p;
    (void)cached;
    for (uint32_t n = 0; n < NUM_JUDGES; n++) {
        bool divided = counts_use(&self->judges[n], key);
        if (divided && n == self->leader)
            heap_divide_scores(&self->cached, COUNTS_LARGEST_USE);
        self->hits[n] = self->hits[n] * self->forgetting + judge(&self->judges[n].heap, key, self->num_slots);
    }
    heap_set_score(&self->cached, key, self->judges[self->leader].heap.score[key]);
    follow_the_best(self);
}

static void lrfu_insert(policy *p, uint32_t key) { heap_insert(&((lrfu *)p)->cached, key); }

static void lrfu_remove(policy *p, uint32_t key) { heap_remove(&((lrfu *)p)->cached, key); }

static uint32_t lrfu_victim(policy *p, bool (*may_go)(uint32_t key, void *data), void *data)
{
    return heap_lowest(&((lrfu *)p)->cached, may_go, data);
}

const policy_kind policy_lrfu = {
    "lrfu", lrfu_create, lrfu_destroy, lrfu_access, lrfu_insert, lrfu_remove, lrfu_victim,
};
