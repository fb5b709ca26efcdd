/* Pages that change their address instead of being copied. Knows nothing of Python. */
#ifndef EDGEINFER_MOVING_H
#define EDGEINFER_MOVING_H

#include <stdbool.h>
#include <stddef.h>

/* Moves what `bytes` at `from` hold to `to`, whatever is there: whole pages of private anonymous memory. The pages at
   `from` read as zeros afterwards, or cannot be touched at all where `guard` is set. Linux 5.7. 0 or -1 with errno. */
int pages_move(void *from, void *to, size_t bytes, bool guard);

#endif
