"""Many processes: experts apart, the rest sharded by FSDP2, one all-to-all there and one back; torchrun starts them."""
