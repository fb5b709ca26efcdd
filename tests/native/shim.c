/* Preloaded before the reader: a file system and a disk that misbehave as the environment says. It acts on files whose
   path ends in SHIM_FILE only. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static long setting(const char *name)
{
    const char *text = getenv(name);
    return text ? atol(text) : -1;
}

static int watched(int fd)
{
    char link[64], path[4096];
    const char *file = getenv("SHIM_FILE");
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (file == NULL || length < (ssize_t)strlen(file))
        return 0;
    path[length] = 0;
    return strcmp(path + length - strlen(file), file) == 0;
}

static void sleep_ms(long ms)
{
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

static void invert(uint8_t *bytes, ssize_t count)
{
    for (ssize_t i = 0; i < count; i++)
        bytes[i] ^= 0xA5;
}

static ssize_t read_at(int fd, void *to, size_t bytes, off_t at)
{
    static ssize_t (*next)(int, void *, size_t, off_t);
    static atomic_uint calls;
    if (next == NULL)
        *(void **)&next = dlsym(RTLD_NEXT, "pread");
    if (!watched(fd))
        return next(fd, to, bytes, at);
    int direct = (fcntl(fd, F_GETFL) & O_DIRECT) != 0;
    const char *gate = getenv("SHIM_GATE"); /* no read ends while this file exists */
    while (gate != NULL && access(gate, F_OK) == 0)
        sleep_ms(1);
    if (setting("SHIM_INTERRUPT") > 0 && atomic_fetch_add(&calls, 1) % 2 == 0) {
        errno = EINTR;
        return -1;
    }
    if (direct && setting("SHIM_REFUSE_DIRECT") > 0) {
        errno = EINVAL;
        return -1;
    }
    long broken = setting("SHIM_BROKEN_AT"), part = setting("SHIM_PART"), cipher = setting("SHIM_CIPHER_MS");
    if (broken >= at && broken < at + (long)bytes) {
        errno = EIO;
        return -1;
    }
    if (direct && cipher >= 0) /* reads do not start together */
        sleep_ms(atomic_fetch_add(&calls, 1) % 4 * cipher / 2);
    ssize_t got = next(fd, to, bytes, at);
    if (part > 0 && got > part)
        got = part; /* the rest was written, but is not promised */
    if (direct && cipher >= 0 && got > 0) { /* what dm-crypt does: what arrives is decrypted where it lies */
        invert(to, got);
        sleep_ms(cipher);
        invert(to, got);
    }
    return got;
}

ssize_t pread(int fd, void *to, size_t bytes, off_t at) { return read_at(fd, to, bytes, at); }
ssize_t pread64(int fd, void *to, size_t bytes, off_t at) { return read_at(fd, to, bytes, at); }

int statx(int fd, const char *path, int flags, unsigned mask, struct statx *about)
{
    static int (*next)(int, const char *, int, unsigned, struct statx *);
    if (next == NULL)
        *(void **)&next = dlsym(RTLD_NEXT, "statx");
    int result = next(fd, path, flags, mask, about);
#ifdef STATX_DIOALIGN
    long block = setting("SHIM_BLOCK");
    if (result == 0 && block > 0 && watched(fd)) {
        about->stx_mask |= STATX_DIOALIGN;
        about->stx_dio_offset_align = (unsigned)block;
        about->stx_dio_mem_align = 512;
    }
#endif
    return result;
}
