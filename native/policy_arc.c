/* "arc", the adaptive replacement cache (Megiddo and Modha, FAST 2003): experts used once lately and experts used
   again share the slots, and the share follows the misses on keys that left either part lately.

   Two departures: a victim is asked for without saying for whom, so the paper's tie (the first part is as long as its
   target) always goes against the first part; and where all keys of the part that should give way are in use, the other
   part gives way. */
#include "policy_lists.h"

/* The paper's T1, T2 (cached), B1 and B2 (their ghosts). */
enum { ONCE, AGAIN, GONE_ONCE, GONE_AGAIN };

typedef struct {
    policy base;
    policy_lists keys;
    uint32_t num_slots;
    double target;  /* slots for ONCE */
    bool *wanted;   /* missed, not inserted yet */
    bool *returned; /* and was a ghost */
} arc;

static void arc_destroy(policy *p)
{
    arc *self = (arc *)p;
    lists_destroy(&self->keys);
    free(self->wanted);
    free(self->returned);
    free(self);
}

static policy *arc_create(uint32_t num_keys, uint32_t num_slots, const policy_options *options)
{
    (void)options;
    arc *self = calloc(1, sizeof *self);
    if (self == NULL)
        return NULL;
    self->num_slots = num_slots;
    self->wanted = calloc(num_keys, sizeof *self->wanted);
    self->returned = calloc(num_keys, sizeof *self->returned);
    if (!lists_create(&self->keys, num_keys, 4) || self->wanted == NULL || self->returned == NULL) {
        arc_destroy(&self->base);
        return NULL;
    }
    return &self->base;
}

/* A miss on a ghost: its part was too small. */
static void arc_adapt(arc *self, uint32_t ghosts)
{
    uint32_t others = ghosts == GONE_ONCE ? GONE_AGAIN : GONE_ONCE;
    double step = (double)self->keys.length[others] / self->keys.length[ghosts];
    if (step < 1)
        step = 1;
    self->target += ghosts == GONE_ONCE ? step : -step;
    if (self->target < 0)
        self->target = 0;
    if (self->target > self->num_slots)
        self->target = self->num_slots;
}

static void arc_access(policy *p, uint32_t key, bool cached)
{
    arc *self = (arc *)p;
    uint32_t list = self->keys.list[key];
    (void)cached;
    if (list == ONCE || list == AGAIN) {
        lists_move(&self->keys, key, AGAIN);
        return;
    }
    self->wanted[key] = true;
    if (list == LISTS_NONE)
        return;
    arc_adapt(self, list);
    self->returned[key] = true;
    lists_move(&self->keys, key, LISTS_NONE);
}

static void arc_forget_oldest(arc *self, uint32_t ghosts)
{
    lists_move(&self->keys, lists_oldest(&self->keys, ghosts, NULL, NULL), LISTS_NONE);
}

static void arc_insert(policy *p, uint32_t key)
{
    arc *self = (arc *)p;
    const uint32_t *length = self->keys.length;
    if (self->keys.list[key] == ONCE || self->keys.list[key] == AGAIN)
        return;
    bool again = self->returned[key] || (!self->wanted[key] && self->keys.list[key] != LISTS_NONE);
    self->wanted[key] = self->returned[key] = false;
    lists_move(&self->keys, key, again ? AGAIN : ONCE);
    while (length[GONE_ONCE] > 0 && length[ONCE] + length[GONE_ONCE] > self->num_slots)
        arc_forget_oldest(self, GONE_ONCE);
    while (length[GONE_AGAIN] > 0 &&
           length[ONCE] + length[AGAIN] + length[GONE_ONCE] + length[GONE_AGAIN] > 2 * (uint64_t)self->num_slots)
        arc_forget_oldest(self, GONE_AGAIN);
}

static void arc_remove(policy *p, uint32_t key)
{
    arc *self = (arc *)p;
    if (self->keys.list[key] == ONCE || self->keys.list[key] == AGAIN)
        lists_move(&self->keys, key, self->keys.list[key] == ONCE ? GONE_ONCE : GONE_AGAIN);
}

static uint32_t arc_victim(policy *p, bool (*may_go)(uint32_t key, void *data), void *data)
{
    arc *self = (arc *)p;
    uint32_t first = self->keys.length[ONCE] > 0 && self->keys.length[ONCE] >= self->target ? ONCE : AGAIN;
    uint32_t key = lists_oldest(&self->keys, first, may_go, data);
    return key != POLICY_NONE ? key : lists_oldest(&self->keys, first == ONCE ? AGAIN : ONCE, may_go, data);
}

const policy_kind policy_arc = {"arc", arc_create, arc_destroy, arc_access, arc_insert, arc_remove, arc_victim};
