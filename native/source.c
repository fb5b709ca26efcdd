#define _GNU_SOURCE
#include "source.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "memory.h"

/* The block size that direct reads need. STATX_DIOALIGN tells it since Linux 6.1; before, the page size is safe. */
static size_t direct_alignment(int fd)
{
    size_t alignment = memory_page_bytes();
#ifdef STATX_DIOALIGN
    struct statx about;
    memset(&about, 0, sizeof about);
    if (statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &about) == 0 && (about.stx_mask & STATX_DIOALIGN)) {
        if (about.stx_dio_offset_align == 0)
            return 0;
        while (alignment < about.stx_dio_offset_align || alignment < about.stx_dio_mem_align)
            alignment *= 2;
    }
#else
    (void)fd;
#endif
    return alignment <= MEMORY_RESERVATION_ALIGNMENT ? alignment : 0;
}

int source_open(source *file, const char *path, bool direct)
{
    memset(file, 0, sizeof *file);
    file->direct_fd = -1;
    file->alignment = memory_page_bytes();
    file->path = strdup(path);
    if (file->path == NULL)
        return ENOMEM;
    file->buffered_fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a named pipe must not wait for a writer */
    struct stat about;
    int error = file->buffered_fd < 0 || fstat(file->buffered_fd, &about) != 0 ? errno : 0;
    if (error == 0 && !S_ISREG(about.st_mode))
        error = S_ISDIR(about.st_mode) ? EISDIR : EINVAL;
    if (error != 0) {
        source_close(file);
        return error;
    }
    file->device = about.st_dev;
    file->inode = about.st_ino;
    file->size = about.st_size;
    file->modified = about.st_mtim;
    file->changed = about.st_ctim;
    /* Whole ranges are asked for, often far apart: the kernel's read-ahead would only fill the page cache. */
    (void)posix_fadvise(file->buffered_fd, 0, 0, POSIX_FADV_RANDOM);
    if (direct) {
        file->direct_fd = open(path, O_RDONLY | O_CLOEXEC | O_DIRECT);
        size_t alignment = file->direct_fd >= 0 ? direct_alignment(file->direct_fd) : 0;
        struct stat second;
        bool same = file->direct_fd >= 0 && fstat(file->direct_fd, &second) == 0 &&
                    second.st_ino == about.st_ino && second.st_dev == about.st_dev;
        if (alignment != 0 && same) {
            file->alignment = alignment;
        } else if (file->direct_fd >= 0) {
            close(file->direct_fd);
            file->direct_fd = -1;
        }
    }
    atomic_init(&file->direct, file->direct_fd >= 0);
    return 0;
}

void source_close(source *file)
{
    if (file->direct_fd >= 0)
        close(file->direct_fd);
    if (file->buffered_fd >= 0)
        close(file->buffered_fd);
    free(file->path);
    file->direct_fd = file->buffered_fd = -1;
    file->path = NULL;
}

int source_read(source *file, void *address, uint64_t offset, size_t length, size_t needed)
{
    uint8_t *to = address;
    size_t done = 0;
    bool direct = atomic_load_explicit(&file->direct, memory_order_relaxed), buffered = false;
    while (done < needed) {
        uint64_t at = offset + done;
        size_t want = length - done;
        size_t to_next_block = (size_t)(round_up(at, file->alignment) - at);
        bool whole_blocks = direct && to_next_block == 0 && want >= file->alignment;
        if (whole_blocks)
            want = (size_t)round_down(want, file->alignment);
        else if (direct && to_next_block > 0 && to_next_block < want)
            want = to_next_block;
        ssize_t got = pread(whole_blocks ? file->direct_fd : file->buffered_fd, to + done, want, (off_t)at);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && errno == EINVAL && whole_blocks) {
            /* Some file systems accept O_DIRECT on open and refuse it on read. */
            atomic_store_explicit(&file->direct, false, memory_order_relaxed);
            direct = false;
            continue;
        }
        if (got < 0)
            return errno;
        if (got == 0)
            return ENODATA;
        done += (size_t)got;
        buffered = buffered || !whole_blocks;
    }
    if (buffered) { /* only pages that lie wholly inside the range are dropped */
        uint64_t start = round_down(offset, memory_page_bytes()), end = round_up(offset + length, memory_page_bytes());
        (void)posix_fadvise(file->buffered_fd, (off_t)start, (off_t)(end - start), POSIX_FADV_DONTNEED);
    }
    return 0;
}

static bool same_time(struct timespec a, struct timespec b) { return a.tv_sec == b.tv_sec && a.tv_nsec == b.tv_nsec; }

bool source_unchanged(const source *file)
{
    struct stat now;
    return fstat(file->buffered_fd, &now) == 0 && now.st_size == file->size &&
           same_time(now.st_mtim, file->modified) && same_time(now.st_ctim, file->changed);
}
