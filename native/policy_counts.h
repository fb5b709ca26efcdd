/* Uses of each key, counted such that old ones weigh less: by half after half_life * num_keys uses of any keys, that is
   after a time in which the average key was used half_life times. A half-life of 0 counts the last use only.

   All counts age alike, so their order does not change: instead of making old uses smaller, new ones count more. */
#ifndef EDGEINFER_POLICY_COUNTS_H
#define EDGEINFER_POLICY_COUNTS_H

#include "policy_heap.h"

#define COUNTS_LARGEST_USE 1e100

typedef struct {
    policy_heap heap; /* some of the keys; the scores, of all keys, are the counts */
    double half_life;
    double use;    /* what a use counts now */
    double growth; /* of it, from use to use: 2 ** (1 / (half_life * num_keys)) */
} aged_counts;

bool counts_create(aged_counts *counts, uint32_t num_keys, double half_life);
void counts_destroy(aged_counts *counts);

/* Counts one use. True: all counts were divided by COUNTS_LARGEST_USE before they grew too large. */
bool counts_use(aged_counts *counts, uint32_t key);

#endif
