/* Cached keys by their score, the lowest on top. */
#ifndef EDGEINFER_POLICY_HEAP_H
#define EDGEINFER_POLICY_HEAP_H

#include "policy_kind.h"

typedef struct {
    uint32_t num_keys, length;
    uint32_t *keys;  /* the heap */
    uint32_t *place; /* for each key: its place in the heap, or POLICY_NONE */
    double *score;   /* for each key, cached or not; equal ones go by the key */
} policy_heap;

bool heap_create(policy_heap *heap, uint32_t num_keys);
void heap_destroy(policy_heap *heap);
static inline bool heap_holds(const policy_heap *heap, uint32_t key) { return heap->place[key] != POLICY_NONE; }
void heap_set_score(policy_heap *heap, uint32_t key, double score);
void heap_insert(policy_heap *heap, uint32_t key);
void heap_remove(policy_heap *heap, uint32_t key);

/* Of all keys. The smallest may become equal. */
void heap_divide_scores(policy_heap *heap, double divisor);

/* From a heap of as many keys. */
void heap_copy_scores(policy_heap *heap, const policy_heap *from);

/* The key with the lowest score that may go, or POLICY_NONE. Looks at the keys that may not go and lie above it, and at
   their children: a layer's experts, however large the heap is. */
uint32_t heap_lowest(const policy_heap *heap, bool (*may_go)(uint32_t key, void *data), void *data);

#endif
