/* What the files of the graph hook share. */
#ifndef EDGEINFER_HOOK_INTERNAL_H
#define EDGEINFER_HOOK_INTERNAL_H

#include "hook.h"

/* The pass cannot go on, and this node must not touch what is absent. The abort callback ends the pass behind it. */
void hook_silence(hook *h, ggml_view *node);
/* The same with an error that sticks: `weight` is used `why`. */
void hook_refuse(hook *h, ggml_view *node, const ggml_view *weight, const char *why);

/* Makes a product by experts ready to be computed. *stop: its run ends behind it. false: the pass ends. */
bool hook_ask_for_experts(hook *h, ggml_view *node, const hook_weight *weight, bool *stop);

#endif
