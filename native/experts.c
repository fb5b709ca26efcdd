#define _GNU_SOURCE
#include "experts_internal.h"

#include <errno.h>
#include <stdlib.h>

#include "monotonic.h"

/* ---- selecting ----------------------------------------------------------------------------------------------- */

static bool slot_ready(const expert_kind *kind, const expert_slot *slot)
{
    for (uint32_t m = 0; m < kind->num_matrices; m++)
        if (slot->matrix[m].state != TRANSFER_READY)
            return false;
    return true;
}

static void count_wanted(expert_cache *cache, expert_kind *kind, uint32_t key, bool decoding, bool is_predicted_layer)
{
    uint32_t number = cache->slot_of_key[key];
    expert_slot *slot = number == EXPERT_NONE ? NULL : &kind->slots[number];
    expert_statistics *s = &cache->statistics;
    if (!decoding) {
        s->prefill_wanted++;
        s->prefill_hits += slot != NULL;
        return;
    }
    s->wanted++;
    s->predicted_wanted += is_predicted_layer;
    if (is_predicted_layer)
        s->predicted_right += cache->predicted[key % cache->num_experts];
    if (slot == NULL)
        return;
    s->guesses_used += slot->guessed;
    cache->guesses_right += slot->guessed;
    if (slot_ready(kind, slot))
        s->hits++;
    else
        s->guess_hits += slot->guessed;
}

/* Waits for a slot while reads that nobody needs any more still go on. EXPERT_NONE: there is none, or halted. */
static uint32_t wait_for_slot(pager *p, expert_kind *kind)
{
    uint32_t number;
    while ((number = experts_find_slot(p->experts, kind)) == EXPERT_NONE && p->in_flight > 0 && !pager_halted(p))
        pthread_cond_wait(&p->ready, &p->lock);
    return number;
}

/* slot_of_expert becomes 0 for the experts that `ids` names. 0, or an errno where they cannot all be had. */
static int mark_wanted(expert_cache *cache, uint32_t layer_number, const int32_t *ids, size_t num_ids)
{
    const expert_layer *layer = &cache->layers[layer_number];
    uint32_t num_wanted = 0;
    for (uint32_t e = 0; e < cache->num_experts; e++)
        cache->slot_of_expert[e] = EXPERT_NONE;
    for (size_t i = 0; i < num_ids; i++) {
        if (ids[i] < 0 || (uint32_t)ids[i] >= layer->num_experts)
            return EINVAL;
        num_wanted += cache->slot_of_expert[ids[i]] == EXPERT_NONE;
        cache->slot_of_expert[ids[i]] = 0;
    }
    return num_wanted > cache->kinds[layer->kind].num_slots ? E2BIG : 0;
}

bool experts_select(pager *p, uint32_t layer_number, const int32_t *ids, size_t num_ids, bool decoding, int32_t *slots,
                    int *error)
{
    expert_cache *cache = p->experts;
    expert_kind *kind = &cache->kinds[cache->layers[layer_number].kind];
    pthread_mutex_lock(&p->lock);
    *error = mark_wanted(cache, layer_number, ids, num_ids);
    if (*error != 0)
        goto done;
    cache->selection++;
    cache->layer = layer_number;
    cache->num_chosen = 0;
    bool is_predicted = decoding && cache->predicted_layer == layer_number;
    /* First everything that is here is held, so that no missing one takes its slot. */
    uint32_t first_key = layer_number * cache->num_experts;
    for (uint32_t e = 0; e < cache->num_experts; e++) {
        if (cache->slot_of_expert[e] == EXPERT_NONE)
            continue;
        uint32_t key = first_key + e, number = cache->slot_of_key[key];
        count_wanted(cache, kind, key, decoding, is_predicted);
        if (number != EXPERT_NONE)
            kind->slots[number].selection = cache->selection;
        if (decoding)
            policy_access(kind->policy, key, number != EXPERT_NONE && !kind->slots[number].passing);
    }
    if (is_predicted)
        for (uint32_t e = 0; e < cache->num_experts; e++)
            cache->statistics.predicted += cache->predicted[e];
    if (cache->predicted_layer != EXPERT_NONE)
        experts_judge_guesses(cache, cache->predicted_layer);
    cache->predicted_layer = EXPERT_NONE;
    for (uint32_t e = 0; e < cache->num_experts; e++) {
        if (cache->slot_of_expert[e] == EXPERT_NONE)
            continue;
        uint32_t key = first_key + e, number = cache->slot_of_key[key];
        if (number == EXPERT_NONE) {
            number = wait_for_slot(p, kind);
            if (number == EXPERT_NONE) {
                if (!pager_halted(p)) /* cannot be: mark_wanted has counted the slots */
                    pager_fail_locked(p, ENOBUFS, "no slot was left for an expert");
                *error = ECANCELED;
                goto done;
            }
            experts_fill_slot(cache, kind, number, key, !decoding);
        }
        expert_slot *slot = &kind->slots[number];
        slot->guessed = false;
        if (decoding && slot->passing) { /* wanted again: it stays */
            slot->passing = false;
            kind->num_loose--;
            policy_insert(kind->policy, key);
        }
        cache->slot_of_expert[e] = number;
        cache->chosen[cache->num_chosen++] = number;
    }
    for (uint32_t m = 0; m < kind->num_matrices; m++) /* matrix by matrix: the first product starts first */
        for (uint32_t i = 0; i < cache->num_chosen; i++)
            experts_request(kind, &cache->needed, m, cache->chosen[i]);
    pager_wake_readers_locked(p, cache->needed.count * (kind->bytes[0] / p->chunk_bytes + 1));
    for (size_t i = 0; i < num_ids; i++)
        slots[i] = (int32_t)cache->slot_of_expert[ids[i]];
done:
    pthread_mutex_unlock(&p->lock);
    return *error == 0;
}

static bool matrix_ready(const expert_cache *cache, const expert_kind *kind, uint32_t matrix)
{
    for (uint32_t i = 0; i < cache->num_chosen; i++)
        if (kind->slots[cache->chosen[i]].matrix[matrix].state != TRANSFER_READY)
            return false;
    return true;
}

bool experts_awaited(const expert_cache *cache)
{
    const expert_kind *kind = &cache->kinds[cache->layers[cache->layer].kind];
    return cache->awaited == EXPERT_NONE || matrix_ready(cache, kind, cache->awaited);
}

bool experts_wait(pager *p, uint32_t matrix, bool *rest_ready)
{
    expert_cache *cache = p->experts;
    pthread_mutex_lock(&p->lock);
    const expert_kind *kind = &cache->kinds[cache->layers[cache->layer].kind];
    if (!matrix_ready(cache, kind, matrix) && !pager_halted(p)) {
        uint64_t start = now_ns();
        cache->awaited = matrix;
        while (!matrix_ready(cache, kind, matrix) && !pager_halted(p))
            pthread_cond_wait(&p->ready, &p->lock);
        cache->awaited = EXPERT_NONE;
        p->statistics.wait_ns += now_ns() - start;
        p->statistics.waits++;
    }
    *rest_ready = true;
    for (uint32_t m = matrix + 1; m < kind->num_matrices; m++)
        *rest_ready = *rest_ready && matrix_ready(cache, kind, m);
    bool good = !pager_halted(p);
    pthread_mutex_unlock(&p->lock);
    return good;
}

void experts_reset(expert_cache *cache)
{
    cache->selection++;
    cache->predicted_layer = EXPERT_NONE;
    cache->needed.count = 0;
    cache->guessed.count = 0;
    cache->num_guessed = 0;
    for (uint32_t k = 0; k < cache->num_kinds; k++)
        for (uint32_t i = 0; i < cache->kinds[k].num_slots; i++) {
            expert_slot *slot = &cache->kinds[k].slots[i];
            if (slot->key != EXPERT_NONE && !experts_slot_issued(&cache->kinds[k], slot))
                experts_empty_slot(cache, &cache->kinds[k], slot);
        }
}

/* ---- life ---------------------------------------------------------------------------------------------------- */

static bool queue_init(expert_queue *q, size_t capacity)
{
    q->entries = calloc(capacity, sizeof *q->entries);
    q->capacity = capacity;
    return q->entries != NULL;
}

expert_cache *experts_new(expert_layer *layers, uint32_t num_layers, uint32_t num_experts, expert_kind *kinds,
                          uint32_t num_kinds)
{
    expert_cache *cache = calloc(1, sizeof *cache);
    if (cache == NULL)
        goto failed;
    cache->layers = layers;
    cache->num_layers = num_layers;
    cache->num_experts = num_experts;
    cache->kinds = kinds;
    cache->num_kinds = num_kinds;
    size_t num_keys = (size_t)num_layers * num_experts, all_slots = 0;
    cache->slot_of_key = malloc(num_keys * sizeof *cache->slot_of_key);
    cache->slot_of_expert = malloc(num_experts * sizeof *cache->slot_of_expert);
    cache->chosen = malloc(num_experts * sizeof *cache->chosen);
    cache->predicted = calloc(num_experts, sizeof *cache->predicted);
    cache->guessed_slots = malloc(num_experts * sizeof *cache->guessed_slots);
    cache->predicted_layer = cache->awaited = EXPERT_NONE;
    for (uint32_t k = 0; k < num_kinds; k++) {
        kinds[k].slots = calloc(kinds[k].num_slots, sizeof *kinds[k].slots);
        if (kinds[k].slots == NULL)
            goto failed;
        for (uint32_t i = 0; i < kinds[k].num_slots; i++)
            kinds[k].slots[i].key = EXPERT_NONE;
        kinds[k].num_loose = kinds[k].num_slots;
        all_slots += kinds[k].num_slots;
    }
    size_t requests = (all_slots + num_experts) * EXPERT_MATRICES * 2;
    if (!cache->slot_of_key || !cache->slot_of_expert || !cache->chosen || !cache->predicted ||
        !cache->guessed_slots ||
        !queue_init(&cache->needed, requests) || !queue_init(&cache->guessed, requests))
        goto failed;
    for (size_t i = 0; i < num_keys; i++)
        cache->slot_of_key[i] = EXPERT_NONE;
    return cache;
failed:
    if (cache != NULL) {
        experts_free(cache);
    } else {
        for (uint32_t k = 0; k < num_kinds; k++)
            policy_free(kinds[k].policy);
        free(layers);
        free(kinds);
    }
    errno = ENOMEM;
    return NULL;
}

void experts_free(expert_cache *cache)
{
    if (cache == NULL)
        return;
    for (uint32_t k = 0; k < cache->num_kinds; k++) {
        policy_free(cache->kinds[k].policy);
        free(cache->kinds[k].slots);
    }
    free(cache->layers);
    free(cache->kinds);
    free(cache->slot_of_key);
    free(cache->slot_of_expert);
    free(cache->chosen);
    free(cache->predicted);
    free(cache->guessed_slots);
    free(cache->needed.entries);
    free(cache->guessed.entries);
    free(cache);
}
