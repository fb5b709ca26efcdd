/* A ggml of a few functions, for the hook's check: the same structures unless a macro shifts one of them. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

enum { NONE, GET_ROWS, MUL_MAT_ID, VIEW, RESHAPE, PERMUTE, TRANSPOSE };

struct tensor {
    int type;
    void *buffer;
#ifdef NARROW_NE
    int32_t ne[4];
    int32_t unused[4];
#else
    int64_t ne[4];
#endif
    size_t nb[4];
#ifdef OP_AFTER_FLAGS
    int32_t flags;
    int op;
    int32_t op_params[16];
#else
    int op;
    int32_t op_params[16];
    int32_t flags;
#endif
#ifdef MORE_SOURCES
    struct tensor *src[11];
#else
    struct tensor *src[10];
#endif
#ifdef VIEW_OFFSET_FIRST
    size_t view_offs;
    struct tensor *view_src;
#else
    struct tensor *view_src;
    size_t view_offs;
#endif
#ifdef NUMBER_BEFORE_DATA
    uint64_t number;
#endif
#ifdef NAME_BEFORE_DATA
    char name[64];
    void *data;
#else
    void *data;
    char name[64];
#endif
    void *extra;
#if !defined NUMBER_BEFORE_DATA && !defined MORE_SOURCES
    char padding[8];
#endif
#ifdef LONGER
    char more[16];
#endif
};

struct init_params {
    size_t mem_size;
    void *mem_buffer;
    bool no_alloc;
};

static struct init_params memory;
static size_t used;

static void *take(size_t bytes)
{
    void *address = (char *)memory.mem_buffer + used;
    used += (bytes + 15) / 16 * 16;
    return used <= memory.mem_size ? address : NULL;
}

void *fake_init(struct init_params parameters)
{
#ifdef NO_CONTEXT
    return NULL;
#endif
    memory = parameters;
    used = 0;
    return memory.mem_buffer ? &memory : NULL;
}

void fake_free(void *context) { (void)context; }
size_t fake_tensor_overhead(void) { return 32 + sizeof(struct tensor); }

static struct tensor *make(int type, int64_t a, int64_t b, int64_t c, struct tensor *view, size_t offset)
{
    take(32);
    struct tensor *t = take(sizeof *t);
    memset(t, 0, sizeof *t);
    t->type = type;
    t->ne[0] = a, t->ne[1] = b, t->ne[2] = c, t->ne[3] = 1;
    t->nb[0] = 4;
    for (int i = 1; i < 4; i++)
        t->nb[i] = t->nb[i - 1] * (size_t)t->ne[i - 1];
    t->view_src = view;
    t->view_offs = offset;
    t->data = view ? (char *)view->data + offset : take(t->nb[3]);
#ifdef NUMBER_BEFORE_DATA
    t->number = 1;
#endif
    return t;
}

static struct tensor *with_sources(struct tensor *t, int op, struct tensor *a, struct tensor *b, struct tensor *c)
{
    t->op = op;
    t->src[0] = a, t->src[1] = b, t->src[2] = c;
    return t;
}

struct tensor *fake_new_tensor_1d(void *context, int type, int64_t a) { return (void)context, make(type, a, 1, 1, 0, 0); }

struct tensor *fake_new_tensor_2d(void *context, int type, int64_t a, int64_t b)
{
    return (void)context, make(type, a, b, 1, NULL, 0);
}

struct tensor *fake_new_tensor_3d(void *context, int type, int64_t a, int64_t b, int64_t c)
{
    return (void)context, make(type, a, b, c, NULL, 0);
}

struct tensor *fake_mul_mat_id(void *context, struct tensor *a, struct tensor *b, struct tensor *ids)
{
    return with_sources(fake_new_tensor_3d(context, 0, a->ne[1], ids->ne[0], b->ne[2]), MUL_MAT_ID, a, b, ids);
}

struct tensor *fake_get_rows(void *context, struct tensor *a, struct tensor *b)
{
    return with_sources(fake_new_tensor_2d(context, 0, a->ne[0], b->ne[0]), GET_ROWS, a, b, NULL);
}

struct tensor *fake_view_1d(void *context, struct tensor *a, int64_t count, size_t offset)
{
    return (void)context, with_sources(make(a->type, count, 1, 1, a, offset), VIEW, a, NULL, NULL);
}

struct tensor *fake_reshape_1d(void *context, struct tensor *a, int64_t count)
{
    return (void)context, with_sources(make(a->type, count, 1, 1, a, 0), RESHAPE, a, NULL, NULL);
}

struct tensor *fake_permute(void *context, struct tensor *a, int w, int x, int y, int z)
{
    (void)context, (void)w, (void)x, (void)y, (void)z;
    return with_sources(make(a->type, a->ne[1], a->ne[0], a->ne[2], a, 0), PERMUTE, a, NULL, NULL);
}

struct tensor *fake_transpose(void *context, struct tensor *a)
{
    return (void)context, with_sources(make(a->type, a->ne[1], a->ne[0], 1, a, 0), TRANSPOSE, a, NULL, NULL);
}

const char *fake_op_name(int op)
{
#ifdef OTHER_NAMES
    static const char *names[] = {"NONE", "ROWS", "MUL_MAT_ID", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"};
#else
    static const char *names[] = {"NONE", "GET_ROWS", "MUL_MAT_ID", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"};
#endif
    return op >= 0 && op < 7 ? names[op] : "?";
}

struct tensor *fake_set_name(struct tensor *t, const char *name)
{
    snprintf(t->name, sizeof t->name, "%s", name);
    return t;
}

void fake_set_input(struct tensor *t) { t->flags |= 1; }
