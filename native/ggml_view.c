#include "ggml_view.h"

#include <string.h>

#include "memory.h"

enum { TYPE_F32 = 0, TYPE_I32 = GGML_VIEW_I32, FLAG_INPUT = 1, OBJECT_BYTES = 32 };

static bool is_op(const ggml_functions *ggml, const ggml_view *node, const char *name)
{
    /* Any small number may be passed to op_name: it indexes a table. A wrong offset could give a wild one. */
    return node->op >= 0 && node->op < 64 && strcmp(ggml->op_name(node->op), name) == 0;
}

#define EXPECT(condition, what) \
    do {                        \
        if (!(condition))       \
            return what;        \
    } while (0)

/* Everything that is looked at must lie in the memory that the library was given. */
typedef struct {
    uintptr_t start, end;
} area;

static bool inside(area memory, const void *address, size_t bytes)
{
    uintptr_t start = (uintptr_t)address;
    return start >= memory.start && start <= memory.end && bytes <= memory.end - start;
}

static const char *check_fields(const ggml_functions *ggml, void *context, area memory, ggml_operations *ops)
{
    EXPECT(ggml->tensor_overhead() == OBJECT_BYTES + sizeof(ggml_view), "the size of struct ggml_tensor");
    ggml_view *experts = ggml->new_tensor_3d(context, TYPE_F32, 32, 5, 7);
    ggml_view *input = ggml->new_tensor_3d(context, TYPE_F32, 32, 2, 3);
    ggml_view *ids = ggml->new_tensor_2d(context, TYPE_I32, 2, 3);
    EXPECT(inside(memory, experts, sizeof *experts) && inside(memory, input, sizeof *input) &&
               inside(memory, ids, sizeof *ids), "making tensors");
    EXPECT(experts->type == TYPE_F32 && ids->type == TYPE_I32, "field type");
    EXPECT(experts->ne[0] == 32 && experts->ne[1] == 5 && experts->ne[2] == 7 && experts->ne[3] == 1, "field ne");
    EXPECT(experts->nb[0] == 4 && experts->nb[1] == 128 && experts->nb[2] == 640 && experts->nb[3] == 4480, "field nb");
    EXPECT(inside(memory, experts->data, 4480), "field data");
    EXPECT(experts->view_src == NULL, "field view_src");
    ggml->set_name(experts, "edgeinfer.name");
    EXPECT(strcmp(experts->name, "edgeinfer.name") == 0, "field name");
    EXPECT(input->flags == 0, "field flags");
    ggml->set_input(input);
    EXPECT(input->flags == FLAG_INPUT, "field flags");
    EXPECT(is_op(ggml, experts, "NONE"), "field op");
    ops->none = experts->op;

    ggml_view *product = ggml->mul_mat_id(context, experts, input, ids);
    EXPECT(inside(memory, product, sizeof *product) && is_op(ggml, product, "MUL_MAT_ID"), "field op of a product");
    EXPECT(product->src[0] == experts && product->src[1] == input && product->src[2] == ids, "field src");
    for (int i = 3; i < GGML_VIEW_SOURCES; i++)
        EXPECT(product->src[i] == NULL, "field src");
    ops->mul_mat_id = product->op;

    ggml_view *part = ggml->view_1d(context, experts, 32, 128);
    EXPECT(inside(memory, part, sizeof *part) && is_op(ggml, part, "VIEW"), "field op of a view");
    EXPECT(part->view_src == experts && part->view_offs == 128, "fields view_src and view_offs");
    EXPECT(part->data == (char *)experts->data + 128, "field data of a view");
    ops->view = part->op;

    ggml_view *line = ggml->new_tensor_1d(context, TYPE_I32, 3);
    ggml_view *table = ggml->new_tensor_2d(context, TYPE_F32, 32, 8);
    ggml_view *rows = ggml->get_rows(context, table, line);
    ggml_view *reshaped = ggml->reshape_1d(context, table, 256);
    ggml_view *permuted = ggml->permute(context, experts, 1, 0, 2, 3);
    ggml_view *transposed = ggml->transpose(context, table);
    EXPECT(inside(memory, rows, sizeof *rows) && is_op(ggml, rows, "GET_ROWS"), "operation GET_ROWS");
    EXPECT(inside(memory, reshaped, sizeof *reshaped) && is_op(ggml, reshaped, "RESHAPE"), "operation RESHAPE");
    EXPECT(inside(memory, permuted, sizeof *permuted) && is_op(ggml, permuted, "PERMUTE"), "operation PERMUTE");
    EXPECT(inside(memory, transposed, sizeof *transposed) && is_op(ggml, transposed, "TRANSPOSE"), "operation TRANSPOSE");
    ops->get_rows = rows->op;
    ops->reshape = reshaped->op;
    ops->permute = permuted->op;
    ops->transpose = transposed->op;
    return NULL;
}

const char *ggml_view_check(const ggml_functions *ggml, ggml_operations *operations)
{
    size_t bytes = (size_t)1 << 20;
    void *buffer = memory_allocate(bytes);
    if (buffer == NULL)
        return "memory for the check";
    ggml_view_init parameters = {.mem_size = bytes, .mem_buffer = buffer, .no_alloc = false};
    area memory = {(uintptr_t)buffer, (uintptr_t)buffer + bytes};
    void *context = ggml->init(parameters);
    const char *difference = context ? check_fields(ggml, context, memory, operations) : "ggml_init";
    if (context != NULL)
        ggml->free(context);
    memory_free(buffer, bytes);
    return difference;
}
