"""Benchmarks: they print ratios and write JSON; they never assert a time.

`python -m minimoe bench` measures one MoE layer, decoding and training against three things: the floor of
`minimoe.cost`, a dense MLP of equal active FLOPs, and other implementations. The router is excluded, and everyone
multiplies by the same routings. What is compared takes turns within each round, and ratios are taken round by round.
"""
