/* What edgeinfer reads of ggml's tensors, and the check that this view is the library's.

   The layout is that of ggml.h in llama.cpp (struct ggml_tensor). It is declared here, not included, so that building
   needs no llama.cpp; ggml_view_check proves it against the library that is loaded. */
#ifndef EDGEINFER_GGML_VIEW_H
#define EDGEINFER_GGML_VIEW_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct ggml_view {
    int type;
    void *buffer;
    int64_t ne[4];
    size_t nb[4];
    int op;
    int32_t op_params[16];
    int32_t flags;
    struct ggml_view *src[10];
    struct ggml_view *view_src;
    size_t view_offs;
    void *data;
    char name[64];
    void *extra;
    char padding[8];
} ggml_view;

#define GGML_VIEW_SOURCES 10
#define GGML_VIEW_I32 26 /* enum ggml_type */

/* struct ggml_init_params */
typedef struct {
    size_t mem_size;
    void *mem_buffer;
    bool no_alloc;
} ggml_view_init;

/* The library's functions that the check calls. */
typedef struct {
    void *(*init)(ggml_view_init);
    void (*free)(void *);
    ggml_view *(*new_tensor_1d)(void *, int, int64_t);
    ggml_view *(*new_tensor_2d)(void *, int, int64_t, int64_t);
    ggml_view *(*new_tensor_3d)(void *, int, int64_t, int64_t, int64_t);
    ggml_view *(*mul_mat_id)(void *, ggml_view *, ggml_view *, ggml_view *);
    ggml_view *(*get_rows)(void *, ggml_view *, ggml_view *);
    ggml_view *(*view_1d)(void *, ggml_view *, int64_t, size_t);
    ggml_view *(*reshape_1d)(void *, ggml_view *, int64_t);
    ggml_view *(*permute)(void *, ggml_view *, int, int, int, int);
    ggml_view *(*transpose)(void *, ggml_view *);
    const char *(*op_name)(int);
    ggml_view *(*set_name)(ggml_view *, const char *);
    void (*set_input)(ggml_view *);
    size_t (*tensor_overhead)(void);
} ggml_functions;

/* Numbers of the operations that matter, as this library has them. */
typedef struct {
    int none, get_rows, mul_mat_id, view, reshape, permute, transpose;
} ggml_operations;

/* NULL when every field that is used is where this view has it; otherwise what differs. */
const char *ggml_view_check(const ggml_functions *ggml, ggml_operations *operations);

#endif
