"""Routing of mixture-of-experts models: recorded as a trace, replayed to judge cache policies and predictors.

    trace.py       which experts each token used, as a file
    accesses.py    a trace as the engine asks for it: groups of experts that are needed at once
    belady.py      the best that any cache could do, knowing the future
    predictors.py  what a predictor is and how it is judged; a file each: recurrence.py, path.py, gate.py
    replay.py      hit rates of the policies (edgeinfer._native.Policy) next to Belady's

An expert of a layer is a key: layer * num_experts + expert, layers with experts counted from 0.
"""
