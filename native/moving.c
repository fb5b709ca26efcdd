#define _GNU_SOURCE
#include "moving.h"

#include <errno.h>
#include <stdint.h>
#include <sys/mman.h>

#include "memory.h"

#ifndef MREMAP_DONTUNMAP /* in headers since glibc 2.32 */
#define MREMAP_DONTUNMAP 4
#endif

int pages_move(void *from, void *to, size_t bytes, bool guard)
{
    size_t page = memory_page_bytes();
    if (bytes == 0 || bytes % page != 0 || (uintptr_t)from % page != 0 || (uintptr_t)to % page != 0) {
        errno = EINVAL;
        return -1;
    }
    /* The source stays mapped, so that nothing else of the process can come to lie there. */
    if (mremap(from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, to) == MAP_FAILED)
        return -1;
    return guard ? mprotect(from, bytes, PROT_NONE) : 0;
}
