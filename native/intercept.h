/* Loading without reading: while llama.cpp maps a model file, it gets address space of the same size instead.

   llama.cpp maps model files with MAP_POPULATE, which reads all of them. For the time of one load, on one thread, the
   library's import of mmap is replaced by a function that hands out a reservation for the files that are named and
   leaves every other call alone. */
#ifndef EDGEINFER_INTERCEPT_H
#define EDGEINFER_INTERCEPT_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

typedef struct {
    dev_t device;
    ino_t inode;
    size_t bytes;
    void *address; /* NULL until the library has mapped it */
} intercepted_file;

/* Replaces the import in the loaded library whose path ends in `library`. The calling thread must call
   intercept_end. False, with nothing changed, where no such import can be found or changed, or within another
   intercept_begin of this thread. Serialised: a second thread waits. */
bool intercept_begin(const char *library, intercepted_file *files, size_t num_files);
void intercept_end(void);

#endif
