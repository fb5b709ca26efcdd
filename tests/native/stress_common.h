/* What the stress programs share: random numbers, the file and its bytes, and a second thread that aborts passes.
   Each program is `NAME FILE SECONDS SEED`, one C file that includes this with _GNU_SOURCE defined. */
#ifndef EDGEINFER_STRESS_COMMON_H
#define EDGEINFER_STRESS_COMMON_H

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "memory.h"
#include "pager.h"

static uint8_t *truth; /* the bytes of the file */
static size_t truth_bytes;
static const char *path;
static unsigned random_state;

static unsigned below(unsigned limit) { return (unsigned)rand_r(&random_state) % limit; }

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void fail(const char *what, unsigned long long number)
{
    fprintf(stderr, "%s %llu\n", what, number);
    abort();
}

/* ---- the aborting thread ------------------------------------------------------------------------------------ */

typedef struct {
    pager *pager;
    pthread_t thread;
    atomic_bool stop, may_abort;
    unsigned seed;
} aborter;

static void *abort_now_and_then(void *argument)
{
    aborter *a = argument;
    while (!atomic_load(&a->stop)) {
        struct timespec t = {0, (long)((unsigned)rand_r(&a->seed) % 2000000)};
        nanosleep(&t, NULL);
        pager_statistics s;
        pager_copy_statistics(a->pager, &s);
        if (s.pass_fraction < 0 || s.pass_fraction > 1)
            fail("fraction of a pass", (unsigned long long)s.passes);
        if (atomic_load(&a->may_abort))
            pager_abort(a->pager);
    }
    return NULL;
}

static void start_aborter(aborter *a, pager *p)
{
    *a = (aborter){.pager = p, .seed = below(1u << 30)};
    if (pthread_create(&a->thread, NULL, abort_now_and_then, a) != 0)
        fail("starting a thread", 0);
}

static void stop_aborter(aborter *a)
{
    atomic_store(&a->stop, true);
    pthread_join(a->thread, NULL);
}

/* ---- the program -------------------------------------------------------------------------------------------- */

/* The last page is not a whole one. */
static void write_file(size_t num_pages)
{
    truth_bytes = num_pages * memory_page_bytes() + 1234;
    truth = malloc(truth_bytes);
    int fd = open(path, O_CREAT | O_TRUNC | O_WRONLY, 0600);
    if (truth == NULL || fd < 0)
        fail("making the file", (unsigned long long)errno);
    for (size_t i = 0; i < truth_bytes; i++)
        truth[i] = (uint8_t)rand_r(&random_state);
    if (write(fd, truth, truth_bytes) != (ssize_t)truth_bytes || close(fd) != 0)
        fail("writing the file", (unsigned long long)errno);
}

/* Takes the arguments and writes the file; the time at which the program is to end. */
static double begin(int argc, char **argv, size_t num_pages)
{
    if (argc != 4)
        exit(2);
    path = argv[1];
    double end = now() + atof(argv[2]);
    random_state = (unsigned)atoi(argv[3]);
    alarm((unsigned)atof(argv[2]) + 30); /* a deadlock ends here */
    write_file(num_pages);
    return end;
}

#endif
