/* "gdsf", greedy-dual-size-frequency (Cherkasova, HPL-98-69R1): the expert with the lowest priority goes, and its
   priority is the floor of all that are counted later. Priority: floor + uses since it came * cost of reading it again.
   All slots are of one size, so size is part of the cost. */
#include "policy_heap.h"

typedef struct {
    policy base;
    policy_heap heap; /* scores are the priorities */
    float *cost;      /* NULL: 1 */
    uint32_t *uses;   /* since the key came into the cache */
    bool *wanted;     /* missed, not inserted yet */
    double floor;
} gdsf;

static void gdsf_destroy(policy *p)
{
    gdsf *self = (gdsf *)p;
    heap_destroy(&self->heap);
    free(self->cost);
    free(self->uses);
    free(self->wanted);
    free(self);
}

static policy *gdsf_create(uint32_t num_keys, uint32_t num_slots, const policy_options *options)
{
    (void)num_slots;
    gdsf *self = calloc(1, sizeof *self);
    if (self == NULL)
        return NULL;
    self->uses = calloc(num_keys, sizeof *self->uses);
    self->wanted = calloc(num_keys, sizeof *self->wanted);
    self->cost = malloc(num_keys * sizeof *self->cost);
    if (!heap_create(&self->heap, num_keys) || self->uses == NULL || self->wanted == NULL || self->cost == NULL) {
        gdsf_destroy(&self->base);
        return NULL;
    }
    for (uint32_t key = 0; key < num_keys; key++)
        self->cost[key] = options->cost != NULL ? options->cost[key] : 1;
    return &self->base;
}

static void gdsf_rate(gdsf *self, uint32_t key)
{
    heap_set_score(&self->heap, key, self->floor + self->uses[key] * (double)self->cost[key]);
}

static void gdsf_access(policy *p, uint32_t key, bool cached)
{
    gdsf *self = (gdsf *)p;
    (void)cached;
    if (!heap_holds(&self->heap, key)) {
        self->wanted[key] = true;
        return;
    }
    self->uses[key] += self->uses[key] < UINT32_MAX;
    gdsf_rate(self, key);
}

static void gdsf_insert(policy *p, uint32_t key)
{
    gdsf *self = (gdsf *)p;
    if (heap_holds(&self->heap, key))
        return;
    self->uses[key] = self->wanted[key];
    self->wanted[key] = false;
    gdsf_rate(self, key);
    heap_insert(&self->heap, key);
}

static void gdsf_remove(policy *p, uint32_t key)
{
    gdsf *self = (gdsf *)p;
    if (!heap_holds(&self->heap, key))
        return;
    if (self->heap.score[key] > self->floor)
        self->floor = self->heap.score[key];
    heap_remove(&self->heap, key);
}

static uint32_t gdsf_victim(policy *p, bool (*may_go)(uint32_t key, void *data), void *data)
{
    return heap_lowest(&((gdsf *)p)->heap, may_go, data);
}

const policy_kind policy_gdsf = {
    "gdsf", gdsf_create, gdsf_destroy, gdsf_access, gdsf_insert, gdsf_remove, gdsf_victim,
};
