/* Keys in lists by their last use: each key is in one list or none, and moves in constant time. */
#ifndef EDGEINFER_POLICY_LISTS_H
#define EDGEINFER_POLICY_LISTS_H

#include "policy_kind.h"

#define LISTS_MAX 4
#define LISTS_NONE LISTS_MAX

typedef struct {
    uint32_t num_keys, num_lists;
    uint32_t *next, *prev; /* circles; node num_keys + n is the head of list n */
    uint8_t *list;         /* for each key: its list, or LISTS_NONE */
    uint32_t length[LISTS_MAX];
} policy_lists;

bool lists_create(policy_lists *lists, uint32_t num_keys, uint32_t num_lists);
void lists_destroy(policy_lists *lists);

/* Makes the key the newest of `list`; it leaves the list it was in. LISTS_NONE only takes it out. */
void lists_move(policy_lists *lists, uint32_t key, uint32_t list);

/* The oldest key of the list that may go, or POLICY_NONE. */
uint32_t lists_oldest(const policy_lists *lists, uint32_t list, bool (*may_go)(uint32_t key, void *data), void *data);

#endif
