"""A decoder layer of Llama-3-8B, adapted in each way, and the training step with its allocation that is timed."""

import torch
from launches import llama_config
from names import ADADORA, ADALORA, FOUR_BITS, RANK
from timing import Stopwatch
from torch import nn
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from variants import adapt


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def quantize(model: nn.Module, device: torch.device) -> None:
    """Replace the linear layers by those of bitsandbytes in 4 bits (nf4), which compute in bfloat16."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            shape = module.in_features, module.out_features
            layer = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4").to(device)
            model.set_submodule(name, layer)
    model.is_loaded_in_4bit = True


class DecoderLayer(nn.Module):
    """One decoder layer, with a loss whose gradient at its output is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        config = llama_config(layers=1, width=width)
        config._attn_implementation = "sdpa"
        self.layer = LlamaDecoderLayer(config, layer_idx=0)
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(
        self, hidden: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor], gradient: torch.Tensor
    ) -> CausalLMOutput:
        output = self.layer(hidden, position_embeddings=positions)
        output = output[0] if isinstance(output, tuple) else output
        return CausalLMOutput(loss=torch.dot(output.flatten(), gradient))


class Training:
    """
    The training of one decoder layer: forward and backward pass, AdamW, and the allocation of AdaLoRA and AdaDoRA.

    Args:
        variant: How the layer is adapted.
        kind: The weights: "bfloat16", or "4-bit".
        width: Its hidden size; Llama-3-8B's is 4096.
        device: Where it is made and trained.
    """

    def __init__(self, variant: str, kind: str, width: int, device: torch.device) -> None:
        self.width, self.device, self.allocations = width, device, 0
        torch.manual_seed(0)
        with device:
            base = DecoderLayer(width).to(torch.bfloat16)
        if kind == FOUR_BITS:
            quantize(base, device)
        self.model = adapt(base, variant, RANK, target_modules=TARGETS).train()
        self.call = self.model
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=device.type == "cuda")
        self.allocates = variant in (ADALORA, ADADORA)
        if self.allocates:
            self.model.base_model.rankallocator.peft_config.tinit = 0  # prune from the second step on
        self.tokens = 0

    def set_tokens(self, tokens: int) -> None:
        """Make the inputs of the next steps: hidden states of this many tokens, and the gradient at the output."""
        if tokens == self.tokens:
            return
        self.tokens = tokens
        with self.device, torch.no_grad():
            self.hidden = torch.randn(1, tokens, self.width, dtype=torch.bfloat16).requires_grad_()
            self.gradient = torch.randn(tokens * self.width, dtype=torch.bfloat16) / tokens
            self.positions = self.model.base_model.model.rotary(self.hidden, torch.arange(tokens)[None])

    def compile(self) -> None:
        """Compile the model for the next steps; on a CPU it is only captured, because to compile it takes minutes."""
        torch.compiler.reset()
        self.call = torch.compile(self.model, backend="inductor" if self.device.type == "cuda" else "eager")

    def step(self, stopwatch: Stopwatch, with_optimizer: bool = True) -> None:
        for tensor in (*self.parameters, self.hidden):
            tensor.grad = None
        stopwatch.mark()
        loss = self.call(self.hidden, self.positions, self.gradient).loss
        stopwatch.mark()
        loss.backward()
        stopwatch.mark()
        if with_optimizer:
            self.optimizer.step()
        stopwatch.mark()
        if self.allocates:
            # within the budget phase for as long as steps are timed
            self.model.base_model.update_and_allocate(min(self.allocations, 500))
            self.allocations += 1
        stopwatch.mark()
