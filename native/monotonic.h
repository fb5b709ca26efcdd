/* The clock that waits and reads are measured by. A file that includes it defines _GNU_SOURCE before all else. */
#ifndef EDGEINFER_MONOTONIC_H
#define EDGEINFER_MONOTONIC_H

#include <stdint.h>
#include <time.h>

static inline uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

#endif
