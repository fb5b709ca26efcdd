#define _GNU_SOURCE
#include "memory.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

size_t memory_page_bytes(void) { return (size_t)sysconf(_SC_PAGESIZE); }

/* Maps more than asked and returns the ends, so that the start is aligned. */
static void *map_aligned(size_t bytes, int protection, int flags)
{
    size_t page = memory_page_bytes();
    if (bytes == 0 || bytes > SIZE_MAX - 2 * MEMORY_RESERVATION_ALIGNMENT) {
        errno = EINVAL;
        return NULL;
    }
    size_t length = round_up(bytes, page);
    size_t padded = length + MEMORY_RESERVATION_ALIGNMENT;
    uint8_t *raw = mmap(NULL, padded, protection, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    if (raw == MAP_FAILED)
        return NULL;
    uint8_t *aligned = (uint8_t *)round_up((uintptr_t)raw, MEMORY_RESERVATION_ALIGNMENT);
    if (aligned > raw)
        munmap(raw, (size_t)(aligned - raw));
    size_t tail = padded - (size_t)(aligned - raw) - length;
    if (tail > 0)
        munmap(aligned + length, tail);
    return aligned;
}

void *memory_reserve(size_t bytes, bool readable)
{
    return map_aligned(bytes, readable ? PROT_READ : PROT_NONE, MAP_NORESERVE);
}

int memory_guard(void *address, size_t bytes)
{
    size_t page = memory_page_bytes();
    if ((uintptr_t)address % page != 0 || bytes % page != 0) {
        errno = EINVAL;
        return -1;
    }
    if (bytes == 0)
        return 0;
    void *mapped = mmap(address, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    return mapped == MAP_FAILED ? -1 : 0;
}

int memory_open(void *address, size_t bytes)
{
    size_t page = memory_page_bytes();
    uintptr_t start = round_down((uintptr_t)address, page);
    uintptr_t end = round_up((uintptr_t)address + bytes, page);
    if (mprotect((void *)start, end - start, PROT_READ | PROT_WRITE) != 0)
        return -1;
    /* Huge pages make direct reads and weight products cheaper; without them everything still works. */
    if (end - start >= MEMORY_RESERVATION_ALIGNMENT)
        (void)madvise((void *)start, end - start, MADV_HUGEPAGE);
    return 0;
}

void *memory_allocate(size_t bytes)
{
    void *address = map_aligned(bytes, PROT_READ | PROT_WRITE, 0);
    if (address != NULL)
        (void)madvise(address, round_up(bytes, memory_page_bytes()), MADV_HUGEPAGE);
    return address;
}

void memory_free(void *address, size_t bytes)
{
    if (address != NULL)
        munmap(address, round_up(bytes, memory_page_bytes()));
}
