/* LD_PRELOAD: a pread that fails on request, as file systems and disks do.

   REFUSE_DIRECT=1   reads of files opened with O_DIRECT fail with EINVAL
   FAIL_AFTER=N      after N good reads every further one fails with EIO
   SHORT_READS=1     a read gives at most one block of 4096 bytes
   DELAY_MS=N        every read takes N milliseconds more

   With TELL=1 one line on standard error tells at exit how many reads were made and how many failed. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/types.h>
#include <unistd.h>

static atomic_long reads, failed;

static long setting(const char *name)
{
    const char *value = getenv(name);
    return value ? atol(value) : 0;
}

static ssize_t faulty(int fd, void *to, size_t bytes, off64_t offset)
{
    static ssize_t (*real)(int, void *, size_t, off64_t);
    if (real == NULL)
        real = (ssize_t(*)(int, void *, size_t, off64_t))dlsym(RTLD_NEXT, "pread64");
    long number = atomic_fetch_add(&reads, 1) + 1;
    if (setting("REFUSE_DIRECT") && (fcntl(fd, F_GETFL) & O_DIRECT)) {
        atomic_fetch_add(&failed, 1);
        errno = EINVAL;
        return -1;
    }
    long good = setting("FAIL_AFTER");
    if (good && number > good) {
        atomic_fetch_add(&failed, 1);
        errno = EIO;
        return -1;
    }
    if (setting("DELAY_MS"))
        usleep((useconds_t)(1000 * setting("DELAY_MS")));
    if (setting("SHORT_READS") && bytes > 4096)
        bytes = 4096;
    return real(fd, to, bytes, offset);
}

ssize_t pread(int fd, void *to, size_t bytes, off_t offset) { return faulty(fd, to, bytes, offset); }
ssize_t pread64(int fd, void *to, size_t bytes, off64_t offset) { return faulty(fd, to, bytes, offset); }

__attribute__((destructor)) static void tell(void)
{
    if (getenv("TELL"))
        dprintf(2, "faulty_read: %ld reads, %ld failed\n", (long)reads, (long)failed);
}
