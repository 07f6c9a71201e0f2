"""The names that stand in tables, for modules that import neither PEFT nor transformers."""

# methods, and the rank that the targets are stated for
ADALORA, DORA, ADADORA, DENSE = "AdaLoRA", "DoRA", "AdaDoRA", "AdaDoRA, dense norm"
LORA = "LoRA"
RANK = 12

# weights, and the phases of a training step
BFLOAT16, FOUR_BITS = "bfloat16", "4-bit"
PHASES = ("forward", "backward", "optimizer", "allocation")

# forms of the norm, and how exact they are
TWO_PARTS, KEPT, ONE_PART, BLOCKS, DENSE_NORM = (
    "R in two parts",
    "R in two parts, ‖W‖² kept",
    "R in one part",
    "float32 blocks",
    "dense",
)
ERROR, CANCELLING_ERROR = "error", "error, rows that nearly cancel"

# parts of AdaDoRA in kernels of their own
NOW, OUTPUT_KERNEL, NORM_KERNEL, BOTH_KERNELS = "as it is", "h in one kernel", "norm in one kernel", "both kernels"
OUTPUT_ERROR, GRADIENT_ERROR = "error of h", "error of the gradients"

# evaluation
PREFILL, CACHING, GENERATE = "prefill", "prefill, DoraCaching()", "generate"
