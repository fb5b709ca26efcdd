/* The slots of the pools, who gets them, and the requests to fill them. */
#include "experts_internal.h"

/* ---- requests ------------------------------------------------------------------------------------------------ */

/* A full queue forgets its oldest entry: capacity is above what can be open, so that one is stale. */
static void queue_push(expert_queue *q, expert_request r)
{
    if (q->count == q->capacity) {
        q->first = (q->first + 1) % q->capacity;
        q->count--;
    }
    q->entries[(q->first + q->count++) % q->capacity] = r;
}

static expert_kind *kind_of_key(expert_cache *cache, uint32_t key)
{
    return &cache->kinds[cache->layers[key / cache->num_experts].kind];
}

static bool matrix_issued(const expert_kind *kind, const expert_slot *slot, uint32_t matrix)
{
    return slot->matrix[matrix].issued == kind->bytes[matrix];
}

void experts_request(expert_kind *kind, expert_queue *q, uint32_t matrix, uint32_t number)
{
    expert_slot *slot = &kind->slots[number];
    if (matrix < kind->num_matrices && !matrix_issued(kind, slot, matrix))
        queue_push(q, (expert_request){number, matrix, slot->key});
}

bool experts_next_chunk(expert_cache *cache, size_t most, pager_chunk *c, bool needed)
{
    expert_queue *q = needed ? &cache->needed : &cache->guessed;
    if (!needed && cache->guesses_in_flight == EXPERT_GUESSES_IN_FLIGHT)
        return false;
    for (; q->count > 0; q->first = (q->first + 1) % q->capacity, q->count--) {
        expert_request r = q->entries[q->first];
        expert_kind *kind = kind_of_key(cache, r.key);
        expert_slot *slot = &kind->slots[r.slot];
        transfer *t = &slot->matrix[r.matrix];
        if (slot->key != r.key || matrix_issued(kind, slot, r.matrix))
            continue; /* given to another expert, or read on another request */
        const expert_layer *layer = &cache->layers[r.key / cache->num_experts];
        uint64_t start = layer->offset[r.matrix] + (uint64_t)(r.key % cache->num_experts) * kind->bytes[r.matrix];
        size_t left = kind->bytes[r.matrix] - t->issued;
        size_t length = left < most ? left : most;
        t->state = TRANSFER_READING;
        *c = (pager_chunk){.source = layer->source[r.matrix], .transfer = t, .total = kind->bytes[r.matrix],
                           .to = t->to + t->issued, .offset = start + t->issued, .length = length, .needed = length,
                           .wanted_offset = start, .wanted_bytes = kind->bytes[r.matrix], .slot = slot,
                           .guess = !needed};
        t->issued += length;
        slot->in_flight++;
        cache->guesses_in_flight += !needed;
        return true;
    }
    return false;
}

/* ---- slots --------------------------------------------------------------------------------------------------- */

typedef struct {
    expert_cache *cache;
    expert_kind *kind;
} eviction;

static bool slot_may_go(const expert_cache *cache, const expert_slot *slot)
{
    return slot->in_flight == 0 && slot->selection != cache->selection;
}

static bool key_may_go(uint32_t key, void *data)
{
    eviction *e = data;
    uint32_t slot = e->cache->slot_of_key[key];
    return slot != EXPERT_NONE && slot_may_go(e->cache, &e->kind->slots[slot]);
}

void experts_empty_slot(expert_cache *cache, expert_kind *kind, expert_slot *slot)
{
    if (slot->key == EXPERT_NONE)
        return;
    if (!slot->passing) {
        policy_remove(kind->policy, slot->key);
        kind->num_loose++;
    }
    cache->slot_of_key[slot->key] = EXPERT_NONE;
    slot->key = EXPERT_NONE;
    slot->passing = false;
}

uint32_t experts_find_slot(expert_cache *cache, expert_kind *kind)
{
    for (uint32_t i = 0; kind->num_loose > 0 && i < kind->num_slots; i++) {
        uint32_t number = (kind->hand + i) % kind->num_slots;
        expert_slot *slot = &kind->slots[number];
        if ((slot->key == EXPERT_NONE && slot->in_flight == 0) || (slot->passing && slot_may_go(cache, slot))) {
            kind->hand = number + 1;
            experts_empty_slot(cache, kind, slot);
            return number;
        }
    }
    eviction e = {cache, kind};
    uint32_t key = policy_victim(kind->policy, key_may_go, &e);
    if (key == POLICY_NONE)
        return EXPERT_NONE;
    uint32_t number = cache->slot_of_key[key];
    experts_empty_slot(cache, kind, &kind->slots[number]);
    return number;
}

void experts_fill_slot(expert_cache *cache, expert_kind *kind, uint32_t number, uint32_t key, bool passing)
{
    expert_slot *slot = &kind->slots[number];
    slot->key = key;
    slot->guessed = false;
    slot->passing = passing;
    slot->selection = cache->selection;
    if (!passing) {
        kind->num_loose--;
        policy_insert(kind->policy, key);
    }
    cache->slot_of_key[key] = number;
    for (uint32_t m = 0; m < kind->num_matrices; m++)
        slot->matrix[m] = (transfer){.state = TRANSFER_IDLE,
                                     .to = kind->pool[m] + (size_t)number * kind->stride[m]};
}

bool experts_slot_issued(const expert_kind *kind, const expert_slot *slot)
{
    for (uint32_t m = 0; m < kind->num_matrices; m++)
        if (!matrix_issued(kind, slot, m))
            return false;
    return true;
}
