/* "lfu": the expert that is used least often goes. Counts age: every use counts half as much after half_life * num_keys
   uses of any keys, so after a time in which the average expert was used half_life times. Experts that are not cached
   are counted too: one that comes back is not judged as new.

   All counts age alike, so their order does not change: instead of making old uses smaller, new ones count more. */
#include "policy_heap.h"

#define LARGEST_USE 1e100

typedef struct {
    policy base;
    policy_heap heap; /* scores are the counts */
    double use;    /* what a use counts now */
    double growth; /* of it, from use to use: 2 ** (1 / (half_life * num_keys)) */
} lfu;

static void lfu_destroy(policy *p)
{
    heap_destroy(&((lfu *)p)->heap);
    free(p);
}

/* 2 ** exponent for an exponent from 0 to 1, without the mathematics library. */
static double power_of_two(double exponent)
{
    double x = exponent * 0.693147180559945309417, term = 1, sum = 1;
    for (int n = 1; n < 18; n++)
        sum += term *= x / n;
    return sum;
}

static policy *lfu_create(uint32_t num_keys, uint32_t num_slots, const policy_options *options)
{
    (void)num_slots;
    lfu *self = calloc(1, sizeof *self);
    if (self == NULL)
        return NULL;
    self->use = 1;
    self->growth = power_of_two(1 / (options->half_life * num_keys));
    if (!heap_create(&self->heap, num_keys)) {
        lfu_destroy(&self->base);
        return NULL;
    }
    return &self->base;
}

static void lfu_access(policy *p, uint32_t key, bool cached)
{
    lfu *self = (lfu *)p;
    (void)cached;
    heap_set_score(&self->heap, key, self->heap.score[key] + self->use);
    self->use *= self->growth;
    if (self->use < LARGEST_USE)
        return;
    self->use /= LARGEST_USE;
    heap_divide_scores(&self->heap, LARGEST_USE);
}

static void lfu_insert(policy *p, uint32_t key) { heap_insert(&((lfu *)p)->heap, key); }

static void lfu_remove(policy *p, uint32_t key) { heap_remove(&((lfu *)p)->heap, key); }

static uint32_t lfu_victim(policy *p, bool (*may_go)(uint32_t key, void *data), void *data)
{
    return heap_lowest(&((lfu *)p)->heap, may_go, data);
}

const policy_kind policy_lfu = {"lfu", lfu_create, lfu_destroy, lfu_access, lfu_insert, lfu_remove, lfu_victim};
