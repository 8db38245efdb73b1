"""The shared-prefix loop: each distinct prefix is read once, all slots decode together.

`scheduler`, `prefixes` and `pool` are pure: which tokens the next pass reads, where their keys and
values go, what is evicted. `passes` turns such a pass into tensors, `attention` is what the model's
own forward calls, `cache` holds keys and values, `packing` the weights, `support` says which models
can run here, and `loop` drives them. See docs/design.md, "The shared-prefix loop".
"""
