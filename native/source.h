/* A file that weights are read from: direct reads where the file system allows them, buffered ones elsewhere. */
#ifndef EDGEINFER_SOURCE_H
#define EDGEINFER_SOURCE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <time.h>

typedef struct {
    char *path;          /* for messages */
    int direct_fd;       /* -1 where the file system refuses O_DIRECT */
    int buffered_fd;
    size_t alignment;    /* file offsets, addresses and lengths of direct reads are multiples of this */
    atomic_bool direct;  /* turned off by the first read that the file system refuses */
    /* What the file was when it was opened: a change ends the run. */
    dev_t device;
    ino_t inode;
    off_t size;
    struct timespec modified, changed;
} source;

/* 0, or an errno. A source that failed to open need not be closed. */
int source_open(source *file, const char *path, bool direct);
void source_close(source *file);

/* Reads at least `needed` of `length` bytes (the rest may lie past the end of the file). `address` and `offset` lie at
   the same place in a block of file->alignment bytes. Whole blocks are read directly, the part of a block at either
   end through the page cache, and nothing outside the range is written, not even for a moment: an encrypting device
   decrypts a direct read where it lies. 0, or an errno; ENODATA where the file ends too early. */
int source_read(source *file, void *address, uint64_t offset, size_t length, size_t needed);

/* True while the file is the one that was opened, unchanged. */
bool source_unchanged(const source *file);

#endif
