/* "lru": the least recently used expert goes. "layers": the same in two parts, so that shallow layers keep a share of
   the slots of their own: their experts are predicted worst (Fate, arXiv 2502.12224). */
#include "policy_lists.h"

enum { SHALLOW, DEEP };

typedef struct {
    policy base;
    policy_lists cached;
    uint8_t *part;          /* for each key; NULL: all are SHALLOW */
    uint32_t shallow_slots; /* more than these give way first */
} recency;

static void recency_destroy(policy *p)
{
    recency *self = (recency *)p;
    lists_destroy(&self->cached);
    free(self->part);
    free(self);
}

static policy *recency_create(uint32_t num_keys, bool parts)
{
    recency *self = calloc(1, sizeof *self);
    if (self == NULL)
        return NULL;
    if (parts)
        self->part = calloc(num_keys, 1);
    if (!lists_create(&self->cached, num_keys, 2) || (parts && self->part == NULL)) {
        recency_destroy(&self->base);
        return NULL;
    }
    return &self->base;
}

static policy *lru_create(uint32_t num_keys, uint32_t num_slots, const policy_options *options)
{
    (void)num_slots;
    (void)options;
    return recency_create(num_keys, false);
}

static policy *layers_create(uint32_t num_keys, uint32_t num_slots, const policy_options *options)
{
    recency *self = (recency *)recency_create(num_keys, true);
    if (self == NULL)
        return NULL;
    uint32_t num_shallow = options->num_layers / 4 > 0 ? options->num_layers / 4 : 1;
    for (uint32_t key = 0; key < num_keys; key++)
        self->part[key] = options->layer[key] < num_shallow ? SHALLOW : DEEP;
    self->shallow_slots = (uint32_t)(options->shallow_share * num_slots);
    return &self->base;
}

static void recency_insert(policy *p, uint32_t key)
{
    recency *self = (recency *)p;
    if (self->cached.list[key] == LISTS_NONE)
        lists_move(&self->cached, key, self->part != NULL ? self->part[key] : SHALLOW);
}

static void recency_access(policy *p, uint32_t key, bool cached)
{
    recency *self = (recency *)p;
    (void)cached;
    if (self->cached.list[key] != LISTS_NONE)
        lists_move(&self->cached, key, self->cached.list[key]);
}

static void recency_remove(policy *p, uint32_t key) { lists_move(&((recency *)p)->cached, key, LISTS_NONE); }

static uint32_t recency_victim(policy *p, bool (*may_go)(uint32_t key, void *data), void *data)
{
    recency *self = (recency *)p;
    uint32_t first = self->cached.length[SHALLOW] > self->shallow_slots ? SHALLOW : DEEP;
    uint32_t key = lists_oldest(&self->cached, first, may_go, data);
    return key != POLICY_NONE ? key : lists_oldest(&self->cached, first == SHALLOW ? DEEP : SHALLOW, may_go, data);
}

const policy_kind policy_lru = {
    "lru", lru_create, recency_destroy, recency_access, recency_insert, recency_remove, recency_victim,
};

const policy_kind policy_layers = {
    "layers", layers_create, recency_destroy, recency_access, recency_insert, recency_remove, recency_victim,
};
