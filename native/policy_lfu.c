/* "lfu": the expert that is used least often goes; uses age (policy_counts.h). Experts that are not cached are counted
   too: one that comes back is not judged as new. */
#include "policy_counts.h"

typedef struct {
    policy base;
    aged_counts counts; /* the heap holds what is cached */
} lfu;

static void lfu_destroy(policy *p)
{
    counts_destroy(&((lfu *)p)->counts);
    free(p);
}

static policy *lfu_create(uint32_t num_keys, uint32_t num_slots, const policy_options *options)
{
    (void)num_slots;
    lfu *self = calloc(1, sizeof *self);
    if (self == NULL)
        return NULL;
    if (!counts_create(&self->counts, num_keys, options->half_life)) {
        lfu_destroy(&self->base);
        return NULL;
    }
    return &self->base;
}

static void lfu_access(policy *p, uint32_t key, bool cached)
{
    (void)cached;
    (void)counts_use(&((lfu *)p)->counts, key);
}

static void lfu_insert(policy *p, uint32_t key) { heap_insert(&((lfu *)p)->counts.heap, key); }

static void lfu_remove(policy *p, uint32_t key) { heap_remove(&((lfu *)p)->counts.heap, key); }

static uint32_t lfu_victim(policy *p, bool (*may_go)(uint32_t key, void *data), void *data)
{
    return heap_lowest(&((lfu *)p)->counts.heap, may_go, data);
}

const policy_kind policy_lfu = {"lfu", lfu_create, lfu_destroy, lfu_access, lfu_insert, lfu_remove, lfu_victim};
