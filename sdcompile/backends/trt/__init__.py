"""What NVIDIA's two compilers share: TensorRT (10.x, 11.x) and TensorRT-RTX have one builder API.

    targets    what cannot be built for which GPU: the table a plan is checked against
    driver     which GPUs this machine has, asked of the driver alone
    graph      what an ONNX graph promises of its engine: attentions, int8 and fp32 layers
    compiling  ONNX -> plan, in a process of its own
    layers     the compiler's own table of what it made, and the claims it has to bear out
    cuda       device memory, streams, graphs and kernels through cuda-bindings
    fitting    which of an engine's plans this machine runs, and what to type where it runs none
    contexts   execution contexts of an engine, the memory they share, and the kernels RTX makes for them
    engine     the plan on a GPU
    arrays     latents that stay on the GPU between two calls of an engine; kernels.cu, and kernels.ptx made of it

Both are strongly typed here: the graph carries the precision, no builder flag does. The module
(`tensorrt` or `tensorrt_rtx`) is passed in by name; nothing in this room imports either by itself.
"""
