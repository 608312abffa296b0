"""Where engines run: GPU kinds in order of preference, several GPUs, a fraction of one, several nodes."""

from llmrun import llm


@llm("Qwen/Qwen2.5-7B-Instruct", name="first-there-is", accelerator=["H100", "A100", "L40S"])
class FirstThereIs: ...


@llm("Qwen/Qwen2.5-72B-Instruct", name="tensor-parallel", accelerator="H100:4")
class TensorParallel: ...


@llm("Qwen/Qwen2.5-72B-Instruct", name="pipelined", accelerator="A100", engine_args="-tp 2 -pp 2")
class Pipelined: ...


@llm("Qwen/Qwen2.5-0.5B-Instruct", name="half-a-gpu", accelerator="A10G", gpus=0.5)
class HalfAGpu: ...


@llm("deepseek-ai/DeepSeek-V3", name="two-nodes", accelerator="H100", gpus=16, nodes=2)
class TwoNodes: ...
