#include "ggml_view.h"

#include <string.h>

enum { TYPE_F32 = 0, TYPE_I32 = 26, FLAG_INPUT = 1, OBJECT_BYTES = 32 };

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

static const char *check_fields(const ggml_functions *ggml, void *context, ggml_operations *ops)
{
    EXPECT(ggml->tensor_overhead() == OBJECT_BYTES + sizeof(ggml_view), "the size of struct ggml_tensor");
    ggml_view *experts = ggml->new_tensor_3d(context, TYPE_F32, 32, 5, 7);
    ggml_view *input = ggml->new_tensor_3d(context, TYPE_F32, 32, 2, 3);
    ggml_view *ids = ggml->new_tensor_2d(context, TYPE_I32, 2, 3);
    EXPECT(experts && input && ids, "making tensors");
    EXPECT(experts->type == TYPE_F32 && ids->type == TYPE_I32, "field type");
    EXPECT(experts->ne[0] == 32 && experts->ne[1] == 5 && experts->ne[2] == 7 && experts->ne[3] == 1, "field ne");
    EXPECT(experts->nb[0] == 4 && experts->nb[1] == 128 && experts->nb[2] == 640 && experts->nb[3] == 4480, "field nb");
    EXPECT(experts->data != NULL, "field data");
    memset(experts->data, 1, 4480); /* inside the context: a wrong address would show under a sanitizer */
    EXPECT(experts->view_src == NULL, "field view_src");
    ggml->set_name(experts, "edgeinfer.name");
    EXPECT(strcmp(experts->name, "edgeinfer.name") == 0, "field name");
    EXPECT(input->flags == 0, "field flags");
    ggml->set_input(input);
    EXPECT(input->flags == FLAG_INPUT, "field flags");
    EXPECT(is_op(ggml, experts, "NONE"), "field op");
    ops->none = experts->op;

    ggml_view *product = ggml->mul_mat_id(context, experts, input, ids);
    EXPECT(product && is_op(ggml, product, "MUL_MAT_ID"), "field op of a product");
    EXPECT(product->src[0] == experts && product->src[1] == input && product->src[2] == ids, "field src");
    for (int i = 3; i < GGML_VIEW_SOURCES; i++)
        EXPECT(product->src[i] == NULL, "field src");
    ops->mul_mat_id = product->op;

    ggml_view *part = ggml->view_1d(context, experts, 32, 128);
    EXPECT(part && is_op(ggml, part, "VIEW"), "field op of a view");
    EXPECT(part->view_src == experts && part->view_offs == 128, "fields view_src and view_offs");
    EXPECT(part->data == (char *)experts->data + 128, "field data of a view");
    ops->view = part->op;

    ggml_view *line = ggml->new_tensor_1d(context, TYPE_I32, 3);
    ggml_view *table = ggml->new_tensor_2d(context, TYPE_F32, 32, 8);
    ggml_view *rows = ggml->get_rows(context, table, line);
    ggml_view *reshaped = ggml->reshape_1d(context, table, 256);
    ggml_view *permuted = ggml->permute(context, experts, 1, 0, 2, 3);
    ggml_view *transposed = ggml->transpose(context, table);
    EXPECT(rows && is_op(ggml, rows, "GET_ROWS"), "operation GET_ROWS");
    EXPECT(reshaped && is_op(ggml, reshaped, "RESHAPE"), "operation RESHAPE");
    EXPECT(permuted && is_op(ggml, permuted, "PERMUTE"), "operation PERMUTE");
    EXPECT(transposed && is_op(ggml, transposed, "TRANSPOSE"), "operation TRANSPOSE");
    ops->get_rows = rows->op;
    ops->reshape = reshaped->op;
    ops->permute = permuted->op;
    ops->transpose = transposed->op;
    return NULL;
}

const char *ggml_view_check(const ggml_functions *ggml, ggml_operations *operations)
{
    ggml_view_init parameters = {.mem_size = (size_t)1 << 20, .mem_buffer = NULL, .no_alloc = false};
    void *context = ggml->init(parameters);
    if (context == NULL)
        return "ggml_init";
    const char *difference = check_fields(ggml, context, operations);
    ggml->free(context);
    return difference;
}
