"""Models that run elsewhere: what engines that serve or train them say of their routing, read into the one trace.

`replies` decodes and checks what was sent, `server` asks vLLM and SGLang, `files` reads Megatron's traces and routing
replay. Nothing here needs the model's weights: its configuration and its tokenizer are enough.
"""
