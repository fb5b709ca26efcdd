#include "policy_counts.h"

/* 2 ** exponent for an exponent from 0 to 1, without the mathematics library. */
static double power_of_two(double exponent)
{
    double x = exponent * 0.693147180559945309417, term = 1, sum = 1;
    for (int n = 1; n < 18; n++)
        sum += term *= x / n;
    return sum;
}

bool counts_create(aged_counts *counts, uint32_t num_keys, double half_life)
{
    *counts = (aged_counts){.half_life = half_life, .use = 1, .growth = 1};
    if (half_life > 0)
        counts->growth = half_life * num_keys > 1 ? power_of_two(1 / (half_life * num_keys)) : 2;
    return heap_create(&counts->heap, num_keys);
}

void counts_destroy(aged_counts *counts) { heap_destroy(&counts->heap); }

bool counts_use(aged_counts *counts, uint32_t key)
{
    if (counts->half_life == 0) {
        heap_set_score(&counts->heap, key, counts->use++);
        return false;
    }
    heap_set_score(&counts->heap, key, counts->heap.score[key] + counts->use);
    counts->use *= counts->growth;
    if (counts->use < COUNTS_LARGEST_USE)
        return false;
    counts->use /= COUNTS_LARGEST_USE;
    heap_divide_scores(&counts->heap, COUNTS_LARGEST_USE);
    return true;
}
