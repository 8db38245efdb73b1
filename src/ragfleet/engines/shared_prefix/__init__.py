"""The shared-prefix loop: each distinct prefix is read once, all slots decode together.

`scheduler`, `waiting`, `prefixes` and `pool` are pure: which tokens the next pass reads, where
their keys and values go, what is evicted. `attention` is what the model's own forward calls,
`forward` one call of it, `support` says which models can run here, and `loop` drives them. `ways`
is what differs between devices. On the CPU `passes` turns a pass into tensors, `cache` holds keys
and values, `packing` the weights. On CUDA that is `varlen_pass` with the kernels of `varlen` and
`triton_kernels`, `varlen_cache` and `fused_layers`; `decoder` makes several tokens at once there,
`graphs` without the host. See docs/design.md, "The shared-prefix loop".
"""
