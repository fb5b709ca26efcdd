/* Guesses: experts that a layer will likely choose are read ahead, and judged once it has chosen. */
#include "experts_internal.h"

#include <string.h>

/* The layer that was guessed at has chosen. A wrong guess that is read already may stay until its slot is wanted, which
   is sooner than the policy would say: it must not push out what was used. One that is not is dropped. */
void experts_judge_guesses(expert_cache *cache, uint32_t layer)
{
    expert_kind *kind = &cache->kinds[cache->layers[layer].kind];
    for (uint32_t i = 0; i < cache->num_guessed; i++) {
        expert_slot *slot = &kind->slots[cache->guessed_slots[i]];
        if (slot->key == EXPERT_NONE || !slot->guessed || slot->selection == cache->selection)
            continue;
        if (!experts_slot_issued(kind, slot)) {
            experts_empty_slot(cache, kind, slot);
        } else {
            policy_remove(kind->policy, slot->key);
            kind->num_loose++;
            slot->passing = true;
        }
    }
    cache->num_guessed = 0;
    cache->guessed.count = 0; /* what was guessed right is asked for again, as needed */
}

/* Wrong guesses cost reads that others wait for: where most are wrong, guessing pauses, and is tried again later. */
static bool guessing_pays(expert_cache *cache)
{
    enum { judged = 256, pause = 2048 };
    if (cache->predictions_off > 0) {
        cache->predictions_off--;
        return false;
    }
    if (cache->guesses_judged >= judged) {
        bool pays = 4 * cache->guesses_right >= cache->guesses_judged;
        cache->guesses_judged = cache->guesses_right = 0;
        if (!pays)
            cache->predictions_off = pause;
        return pays;
    }
    return true;
}

void experts_predict(pager *p, uint32_t layer, const uint32_t *experts, size_t num_experts)
{
    expert_cache *cache = p->experts;
    if (layer >= cache->num_layers)
        return;
    expert_kind *kind = &cache->kinds[cache->layers[layer].kind];
    uint32_t limit = cache->layers[layer].num_experts;
    pthread_mutex_lock(&p->lock);
    if (!guessing_pays(cache)) {
        pthread_mutex_unlock(&p->lock);
        return;
    }
    memset(cache->predicted, 0, cache->num_experts * sizeof *cache->predicted);
    cache->num_guessed = 0;
    cache->predicted_layer = layer;
    /* Those that are here are spared first: another guess must not take their place. */
    for (size_t i = 0; i < num_experts; i++) {
        if (experts[i] >= limit)
            continue;
        uint32_t number = cache->slot_of_key[layer * cache->num_experts + experts[i]];
        cache->predicted[experts[i]] = true;
        if (number != EXPERT_NONE)
            kind->slots[number].selection = cache->selection;
    }
    for (size_t i = 0; i < num_experts; i++) {
        uint32_t key = layer * cache->num_experts + experts[i];
        if (experts[i] >= limit || cache->slot_of_key[key] != EXPERT_NONE)
            continue;
        uint32_t number = experts_find_slot(cache, kind);
        if (number == EXPERT_NONE)
            break;
        experts_fill_slot(cache, kind, number, key, false);
        kind->slots[number].guessed = true;
        cache->guessed_slots[cache->num_guessed++] = number;
        cache->statistics.guesses++;
        cache->guesses_judged++;
        for (uint32_t m = 0; m < kind->num_matrices; m++)
            experts_request(kind, &cache->guessed, m, number);
    }
    if (cache->guessed.count > 0)
        pager_wake_readers_locked(p, EXPERT_GUESSES_IN_FLIGHT - cache->guesses_in_flight);
    pthread_mutex_unlock(&p->lock);
}
