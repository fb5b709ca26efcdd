#define _GNU_SOURCE
#include "intercept.h"

#include <elf.h>
#include <link.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "memory.h"

#if defined(__x86_64__)
#define IS_IMPORT(type) ((type) == R_X86_64_JUMP_SLOT || (type) == R_X86_64_GLOB_DAT)
#elif defined(__aarch64__)
#define IS_IMPORT(type) ((type) == R_AARCH64_JUMP_SLOT || (type) == R_AARCH64_GLOB_DAT)
#else
#define IS_IMPORT(type) ((void)(type), false)
#endif

/* The import table is the process's, so this state is too. */
static pthread_mutex_t one_load = PTHREAD_MUTEX_INITIALIZER;
static void **slot;
static void *original;
static _Thread_local intercepted_file *expected;
static _Thread_local size_t num_expected;

static void *mmap_without_reading(void *address, size_t length, int protection, int flags, int fd, off_t offset)
{
    struct stat about;
    if (expected != NULL && address == NULL && offset == 0 && fd >= 0 && fstat(fd, &about) == 0)
        for (size_t i = 0; i < num_expected; i++)
            if (about.st_dev == expected[i].device && about.st_ino == expected[i].inode &&
                length == expected[i].bytes && expected[i].address == NULL) {
                void *reservation = memory_reserve(length, true);
                if (reservation == NULL)
                    return MAP_FAILED;
                expected[i].address = reservation;
                return reservation;
            }
    return mmap(address, length, protection, flags, fd, offset);
}

typedef struct {
    const char *library;
    void **slot;
} search;

static void search_table(const struct dl_phdr_info *info, const ElfW(Rela) *table, size_t bytes,
                         const ElfW(Sym) *symbols, const char *strings, search *found)
{
    for (size_t i = 0; table != NULL && i < bytes / sizeof *table; i++) {
        if (!IS_IMPORT(ELF64_R_TYPE(table[i].r_info)))
            continue;
        const char *name = strings + symbols[ELF64_R_SYM(table[i].r_info)].st_name;
        if (strcmp(name, "mmap") == 0 || strcmp(name, "mmap64") == 0)
            found->slot = (void **)(info->dlpi_addr + table[i].r_offset);
    }
}

static int search_library(struct dl_phdr_info *info, size_t size, void *data)
{
    (void)size;
    search *found = data;
    size_t length = strlen(info->dlpi_name), wanted = strlen(found->library);
    if (wanted == 0 || length < wanted || strcmp(info->dlpi_name + length - wanted, found->library) != 0)
        return 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        if (info->dlpi_phdr[i].p_type != PT_DYNAMIC)
            continue;
        const ElfW(Rela) *rela = NULL, *jumps = NULL;
        const ElfW(Sym) *symbols = NULL;
        const char *strings = NULL;
        size_t rela_bytes = 0, jump_bytes = 0;
        const ElfW(Dyn) *d = (const ElfW(Dyn) *)(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
        for (; d->d_tag != DT_NULL; d++) {
            if (d->d_tag == DT_RELA)
                rela = (const void *)d->d_un.d_ptr;
            else if (d->d_tag == DT_RELASZ)
                rela_bytes = d->d_un.d_val;
            else if (d->d_tag == DT_JMPREL)
                jumps = (const void *)d->d_un.d_ptr;
            else if (d->d_tag == DT_PLTRELSZ)
                jump_bytes = d->d_un.d_val;
            else if (d->d_tag == DT_SYMTAB)
                symbols = (const void *)d->d_un.d_ptr;
            else if (d->d_tag == DT_STRTAB)
                strings = (const void *)d->d_un.d_ptr;
        }
        if (symbols != NULL && strings != NULL) {
            search_table(info, rela, rela_bytes, symbols, strings, found);
            search_table(info, jumps, jump_bytes, symbols, strings, found);
        }
    }
    return found->slot != NULL;
}

/* Import slots may lie in pages that were made read-only after relocation. */
static bool write_slot(void **where, void *value)
{
    size_t page = memory_page_bytes();
    uintptr_t start = round_down((uintptr_t)where, page);
    size_t bytes = round_up((uintptr_t)(where + 1), page) - start;
    if (mprotect((void *)start, bytes, PROT_READ | PROT_WRITE) != 0)
        return false;
    __atomic_store_n(where, value, __ATOMIC_SEQ_CST);
    return true;
}

bool intercept_begin(const char *library, intercepted_file *files, size_t num_files)
{
    if (expected != NULL) /* on this thread already: the lock would wait for itself */
        return false;
    pthread_mutex_lock(&one_load);
    search found = {.library = library, .slot = NULL};
    dl_iterate_phdr(search_library, &found);
    void *replacement;
    void *(*function)(void *, size_t, int, int, int, off_t) = mmap_without_reading;
    memcpy(&replacement, &function, sizeof replacement);
    if (found.slot != NULL) {
        original = *found.slot;
        slot = found.slot;
        if (write_slot(slot, replacement)) {
            expected = files;
            num_expected = num_files;
            return true;
        }
    }
    pthread_mutex_unlock(&one_load);
    return false;
}

void intercept_end(void)
{
    write_slot(slot, original);
    expected = NULL;
    num_expected = 0;
    pthread_mutex_unlock(&one_load);
}
