/* What the files of the cache of experts share: slots and requests to fill them. The pager's lock is held. */
#ifndef EDGEINFER_EXPERTS_INTERNAL_H
#define EDGEINFER_EXPERTS_INTERNAL_H

#include "experts.h"

/* A slot that is free, or that a prefill left behind; then the policy's choice. EXPERT_NONE: all are in use. */
uint32_t experts_find_slot(expert_cache *cache, expert_kind *kind);
/* The slot is free. `passing`: only for this pass; otherwise the policy knows it from now on. */
void experts_fill_slot(expert_cache *cache, expert_kind *kind, uint32_t number, uint32_t key, bool passing);
void experts_empty_slot(expert_cache *cache, expert_kind *kind, expert_slot *slot);

/* Asks for what is not read of a matrix of the expert in this slot; nothing where its kind has no such matrix. */
void experts_request(expert_kind *kind, expert_queue *q, uint32_t matrix, uint32_t number);
/* Whether every piece of the expert is read or on the way. */
bool experts_slot_issued(const expert_kind *kind, const expert_slot *slot);

/* The layer that was guessed at has chosen. */
void experts_judge_guesses(expert_cache *cache, uint32_t layer);

#endif
