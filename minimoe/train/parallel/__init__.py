"""Many processes: experts apart, the rest sharded by FSDP2, one all-to-all there and one back; torchrun starts them.

Tested on CPUs over gloo. On GPUs, with NCCL and in bfloat16, none of it has been run.
"""
