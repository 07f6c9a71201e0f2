"""What the variants are compared on: one linear layer, Llama models and transformer blocks, all with random weights.

A case builds its models, their inputs, and the steps that are timed.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from variants import RANK, VARIANTS, adapt

from peft import PeftModel


VOCABULARY = 1024


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def without_gradients(function: Callable[[], Any]) -> Callable[[], Any]:
    return torch.no_grad()(function)


def training_step(
    model: nn.Module,
    inputs: torch.Tensor,
    forward: Callable[[], torch.Tensor],
    gradient: Optional[torch.Tensor] = None,
) -> Callable[[], None]:
    """
    A function that runs a forward and a backward pass, with no gradient left from the last time.

    Args:
        model: Whose parameters get gradients.
        inputs: Gets a gradient as well, if it requires one.
        forward: Gives the loss, or an output of which `gradient` is the gradient.
        gradient: `None` for a loss.
    """
    tensors = [tensor for tensor in (*model.parameters(), inputs) if tensor.requires_grad]

    def step() -> None:
        for tensor in tensors:
            tensor.grad = None
        forward().backward(gradient)

    return step


class OneLinear(nn.Module):
    """A model that is a single linear layer."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


@dataclass(frozen=True)
class LayerCase:
    """A linear layer of weight (out, in) with a bias, adapted at a rank, and the number of tokens that it gets."""

    out_features: int
    in_features: int
    tokens: int
    rank: int = RANK
    dtype: torch.dtype = torch.float32

    @property
    def labels(self) -> dict[str, Any]:
        """The columns of a table that tell the case."""
        return {
            "out×in": f"{self.out_features}×{self.in_features}",
            "tokens": self.tokens,
            "rank": self.rank,
            "dtype": dtype_name(self.dtype),
        }

    def build(self, device: torch.device, variants: Iterable[str] = VARIANTS) -> dict[str, PeftModel]:
        """The layer adapted in each way, by the name of the variant."""
        torch.manual_seed(0)
        with device:
            base = OneLinear(self.out_features, self.in_features).to(self.dtype)
        return {name: adapt(copy.deepcopy(base), name, self.rank, target_modules=["linear"]) for name in variants}

    def inputs(self, device: torch.device) -> torch.Tensor:
        """x of shape (tokens, in), which requires a gradient."""
        torch.manual_seed(1)
        return torch.randn(self.tokens, self.in_features).to(device, self.dtype).requires_grad_()

    def forward(self, model: PeftModel, inputs: torch.Tensor) -> torch.Tensor:
        return model(inputs)

    def training_step(self, model: PeftModel, inputs: torch.Tensor) -> Callable[[], None]:
        model.train()
        gradient = torch.randn(self.tokens, self.out_features).to(inputs)
        return training_step(model, inputs, lambda: self.forward(model, inputs), gradient)

    def forward_pass(self, model: PeftModel, inputs: torch.Tensor) -> Callable[[], torch.Tensor]:
        """In eval mode and without gradients."""
        model.eval()
        return without_gradients(lambda: self.forward(model, inputs))


@dataclass(frozen=True)
class LlamaCase:
    """
    A Llama of which all linear layers are adapted, and the number of tokens that it gets.

    Args:
        is_block: Whether to leave out embedding, head and loss, and have nothing but the transformer blocks.
    """

    name: str
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    layers: int
    tokens: int
    dtype: torch.dtype = torch.float32
    rank: int = RANK
    is_block: bool = False

    @property
    def labels(self) -> dict[str, Any]:
        """The columns of a table that tell the case."""
        return {"model": self.name, "tokens": self.tokens, "rank": self.rank, "dtype": dtype_name(self.dtype)}

    def build(self, device: torch.device, variants: Iterable[str] = VARIANTS) -> dict[str, PeftModel]:
        """The model adapted in each way, by the name of the variant."""
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=2 * self.tokens + 128,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=not self.is_block,
        )
        torch.manual_seed(0)
        with device:
            base = (LlamaModel if self.is_block else LlamaForCausalLM)(config).to(self.dtype)
        options = {"target_modules": "all-linear", "task_type": None if self.is_block else "CAUSAL_LM"}
        return {name: adapt(copy.deepcopy(base), name, self.rank, **options) for name in variants}

    def inputs(self, device: torch.device) -> torch.Tensor:
        """Hidden states (1, tokens, hidden) that require a gradient for a block, else token ids (1, tokens)."""
        torch.manual_seed(1)
        if self.is_block:
            return torch.randn(1, self.tokens, self.hidden).to(device, self.dtype).requires_grad_()
        return torch.randint(VOCABULARY, (1, self.tokens)).to(device)

    def forward(self, model: PeftModel, inputs: torch.Tensor) -> torch.Tensor:
        """The loss of predicting the tokens, or the hidden states that leave a block."""
        if self.is_block:
            return model(inputs_embeds=inputs).last_hidden_state
        return model(input_ids=inputs, labels=inputs).loss

    def training_step(self, model: PeftModel, inputs: torch.Tensor) -> Callable[[], None]:
        model.train()
        gradient = torch.randn_like(inputs) if self.is_block else None
        return training_step(model, inputs, lambda: self.forward(model, inputs), gradient)

    def forward_pass(self, model: PeftModel, inputs: torch.Tensor) -> Callable[[], torch.Tensor]:
        """In eval mode and without gradients: the logits of all tokens, or the hidden states that leave a block."""
        model.eval()
        if self.is_block:
            return without_gradients(lambda: self.forward(model, inputs))
        return without_gradients(lambda: model(input_ids=inputs).logits)


Case = LayerCase | LlamaCase
