/* Address space and pages: reservations, guards, and large anonymous areas. Knows nothing of Python. */
#ifndef EDGEINFER_MEMORY_H
#define EDGEINFER_MEMORY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Reservations start on a 2 MiB boundary: huge pages fit, and any sane block size of a disk divides it. */
#define MEMORY_RESERVATION_ALIGNMENT ((size_t)2 << 20)

size_t memory_page_bytes(void);

/* Address space of `bytes` that costs nothing until touched. `readable` gives zeros on reading; otherwise any
   access faults. NULL and errno on failure. */
void *memory_reserve(size_t bytes, bool readable);

/* Replaces whole pages by untouchable ones; what they held is dropped. 0 or -1 with errno. */
int memory_guard(void *address, size_t bytes);

/* Makes the pages that cover [address, address + bytes) readable and writable. 0 or -1 with errno. */
int memory_open(void *address, size_t bytes);

/* Anonymous readable and writable memory on huge pages where the system has them. NULL and errno on failure. */
void *memory_allocate(size_t bytes);

void memory_free(void *address, size_t bytes);

static inline uint64_t round_down(uint64_t value, uint64_t unit) { return value - value % unit; }
static inline uint64_t round_up(uint64_t value, uint64_t unit) { return round_down(value + unit - 1, unit); }

#endif
