"""Does what the guide says of plain AdaLoRA, and tells what comes of it.

    python tests/plain_adalora.py [--without-adadora]

Prints, for each row of the guide's tables that is done here, by the words of its first cell: `true` if it went right,
`false` if it went wrong without an error, or the error's name.
"""

import importlib
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock


if "--without-adadora" in sys.argv:
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder.__module__ != "_peft_adadora"]

import torch
from accelerate import cpu_offload
from schedulefree import AdamWScheduleFree
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

from peft import (
    AdaLoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.optimizers import create_lorafa_optimizer


X, TARGET = (torch.randn(32, size, generator=torch.Generator().manual_seed(size)) for size in (10, 4))
TOKENS = torch.arange(10)[None]
ROWS: dict[str, Callable[["Adapters"], bool]] = {}


def row(words: str) -> Callable:
    """Register a function under the words of the guide. It returns whether all went right."""

    def register(function: Callable[["Adapters"], bool]) -> Callable[["Adapters"], bool]:
        ROWS[words] = function
        return function

    return register


class Model(nn.Module):
    """Modules whose names are in those of others, or are called as adapters are here."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.last = nn.Linear(10, 12), nn.Linear(12, 10, bias=False), nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.down(torch.tanh(self.up(x)))))


class Around(nn.Module):
    """A model of one layer, and perhaps of another one that holds the same weight."""

    def __init__(self, layer: nn.Module, is_shared: bool = False):
        super().__init__()
        self.layer = layer
        if is_shared:
            self.other = nn.Linear(10, 10)
            self.other.weight = layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        return self.other(x) if hasattr(self, "other") else x


def make_model() -> Model:
    torch.manual_seed(0)
    return Model()


def make_llama() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


class Adapters:
    """Adapters of one kind: with `use_dora_adaptive`, or plain AdaLoRA."""

    def __init__(self, use_dora_adaptive: bool):
        self.options = {"use_dora_adaptive": True} if use_dora_adaptive else {}

    def config(self, **kwargs) -> AdaLoraConfig:
        schedule = {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 5, "deltaT": 1, "total_step": 20}
        options = {"target_modules": ["up", "down", "last"], "lora_alpha": 12}
        return AdaLoraConfig(**{**schedule, **options, **self.options, **kwargs})

    def fresh(self, adapter_name: str = "default", **kwargs) -> PeftModel:
        return get_peft_model(make_model(), self.config(**kwargs), adapter_name=adapter_name)

    def around(self, layer: nn.Module, is_shared: bool = False) -> PeftModel:
        base = Around(layer, is_shared)
        return trained_by_hand(get_peft_model(base, self.config(target_modules=["layer"])))

    def llama_config(self, **kwargs) -> AdaLoraConfig:
        return self.config(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **kwargs)

    def llama(self, **kwargs) -> PeftModel:
        return get_peft_model(make_llama(), self.llama_config(**kwargs))

    def loaded_llama(self) -> PeftModel:
        with tempfile.TemporaryDirectory() as folder:
            self.llama().save_pretrained(folder)
            return PeftModel.from_pretrained(make_llama(), folder)


def adapted(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "lora_E") and hasattr(module, "base_layer")]


def trained_by_hand(model: PeftModel) -> PeftModel:
    for layer in adapted(model):
        for factors in (layer.lora_A, layer.lora_E, layer.lora_B):
            for factor in factors.values():
                factor.data.normal_(std=0.4)
    return model.eval()


def train(model: PeftModel, steps: int = 20) -> PeftModel:
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=2e-2)
    model.train()
    for step in range(steps):
        nn.functional.mse_loss(model(X), TARGET).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    return model.eval()


def is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def loads_as_saved(model: PeftModel, saved_as: str = "default", load_as: str = "default", **kwargs) -> bool:
    """Whether a saved and loaded adapter gives the outputs of the model."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=[saved_as])
        where = Path(folder, "" if saved_as == "default" else saved_as)
        loaded = PeftModel.from_pretrained(make_model(), where, adapter_name=load_as, **kwargs).eval()
    return is_close(loaded(X), model.eval()(X))


def merges_as_it_predicts(model: PeftModel, x: torch.Tensor = X) -> bool:
    expected = model(x)
    model.merge_adapter()
    return is_close(model(x), expected)


def warnings_of(action: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(warning.message) for warning in caught]


# ------------------------------------------------------------------------------------------ repaired for plain AdaLoRA


@row("a step whose gradients are not finite, such as one that a gradient scaler skips")
def leaves_out_an_overflow(adapters: Adapters) -> bool:
    model = adapters.fresh()
    for step in range(20):
        model.zero_grad()
        nn.functional.mse_loss(model(X), TARGET).backward()
        for layer in adapted(model) if step == 0 else ():
            layer.lora_B["default"].grad.fill_(torch.inf)
        for layer in adapted(model):
            layer.lora_E["default"].data += 0.01
        model.base_model.update_and_allocate(step)
    return sum(int(layer.lora_E["default"].count_nonzero()) for layer in adapted(model)) == 6


@row("a convolution with several groups")
def convolves_in_groups(adapters: Adapters) -> bool:
    model = adapters.around(nn.Conv2d(4, 6, 3, groups=2))
    return model(torch.randn(1, 4, 5, 5)).shape == (1, 6, 3, 3)


@row("a loss computed by a model that was loaded for inference")
def computes_a_loss(adapters: Adapters) -> bool:
    loss = adapters.loaded_llama()(input_ids=TOKENS, labels=TOKENS).loss
    return is_close(loss, make_llama()(input_ids=TOKENS, labels=TOKENS).loss)


@row("a loss after the adapter in training was deleted, and another one loaded under its name")
def forgets_what_was_deleted(adapters: Adapters) -> bool:
    model = adapters.llama()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.add_adapter("other", adapters.llama_config(inference_mode=True))
        model.set_adapter("other")
        model.delete_adapter("default")
        model.load_adapter(folder, "default")
    model.set_adapter("default")
    loss = model.train()(input_ids=TOKENS, labels=TOKENS).loss
    return is_close(loss, make_llama()(input_ids=TOKENS, labels=TOKENS).loss)


@row("an adapter to train, added to a model that was loaded for inference")
def trains_another(adapters: Adapters) -> bool:
    model = adapters.loaded_llama()
    model.add_adapter("other", adapters.llama_config())
    model.set_adapter("other")
    model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
    model.base_model.update_and_allocate(0)
    return True


@row("an allocation when some factors have no gradient")
def allocates_with_some_gradients(adapters: Adapters) -> bool:
    model = adapters.fresh()
    model(X).sum().backward()
    adapted(model)[0].lora_A["default"].grad = None
    model.base_model.update_and_allocate(0)
    return True


@row("an allocation when no factor has a gradient")
def allocates_without_gradients(adapters: Adapters) -> bool:
    adapters.fresh().base_model.update_and_allocate(0)
    return True


@row("`target_r` equal to `init_r`")
def prunes_nothing(adapters: Adapters) -> bool:
    model = train(adapters.fresh(target_r=6))
    return all(layer.lora_E["default"].all() for layer in adapted(model))


@row("an allocation for an adapter whose name is part of another's")
def leaves_the_other_alone(adapters: Adapters) -> bool:
    model = adapters.fresh("sft")
    model.add_adapter("sft2", adapters.config(inference_mode=True))
    trained_by_hand(model).set_adapter("sft")
    others = {name: param for name, param in model.named_parameters() if ".sft2" in name}
    before = {name: param.requires_grad_(False).clone() for name, param in others.items()}
    train(model)
    return all(torch.equal(param, before[name]) for name, param in others.items())


@row("saving a pruned adapter whose name is part of a module's")
def saves_under_the_name_of_a_module(adapters: Adapters) -> bool:
    return loads_as_saved(train(adapters.fresh("up")), "up")


@row("saving a pruned adapter that was injected without `AdaLoraModel`")
def saves_what_was_injected(adapters: Adapters) -> bool:
    trained = train(adapters.fresh())
    model = inject_adapter_in_model(adapters.config(), make_model())
    model.load_state_dict(trained.base_model.model.state_dict())
    rank_pattern = trained.peft_config["default"].rank_pattern
    model.peft_config["default"].rank_pattern = rank_pattern
    weights = get_peft_model_state_dict(model)
    kept = sum(map(sum, rank_pattern.values()))
    return sum(len(weight) for name, weight in weights.items() if "lora_E" in name) == kept


@row("a pruned adapter with `low_cpu_mem_usage=True`")
def loads_with_little_memory(adapters: Adapters) -> bool:
    return loads_as_saved(train(adapters.fresh()), low_cpu_mem_usage=True)


@row("saving and loading where a module is wrapped, by activation checkpointing or `torch.compile`")
def saves_what_is_wrapped(adapters: Adapters) -> bool:
    model = adapters.fresh()
    model.base_model.model.up = checkpoint_wrapper(model.base_model.model.up)
    return loads_as_saved(train(model))


@row("a schedule-free optimizer")
def keeps_pruned_in_averages(adapters: Adapters) -> bool:
    model = adapters.fresh()
    optimizer = AdamWScheduleFree([param for param in model.parameters() if param.requires_grad], lr=2e-2)
    optimizer.train()
    for step in range(20):
        nn.functional.mse_loss(model(X), TARGET).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step, *([] if "--without-adadora" in sys.argv else [optimizer]))
        optimizer.zero_grad()
    optimizer.eval()
    return sum(int(layer.lora_E["default"].count_nonzero()) for layer in adapted(model)) == 6


@row("200 forward passes in training without an allocation")
def warns_of_no_allocation(adapters: Adapters) -> bool:
    model = adapters.llama().train()
    losses = range(201)
    return len(warnings_of(lambda: [model(input_ids=TOKENS, labels=TOKENS).loss for _ in losses])) == 1


@row("a saved rank pattern, when it is loaded")
def warns_of_no_rank_pattern(adapters: Adapters) -> bool:
    model = train(adapters.fresh())
    return not any("rank_pattern" in message for message in warnings_of(lambda: loads_as_saved(model)))


# ------------------------------------------------------------------------------------- left as it is with the flag off


@row("`ranknum`, the number that the update is divided by, over bfloat16 and float16 weights")
def leaves_ranknum_alone(adapters: Adapters) -> bool:
    model = get_peft_model(make_model().bfloat16(), adapters.config())
    return not any(layer.ranknum["default"].requires_grad for layer in adapted(model))


@row("the factors of an adapter that is loaded for inference over bfloat16 and float16 weights")
def freezes_what_is_loaded(adapters: Adapters) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        adapters.fresh().save_pretrained(folder)
        model = PeftModel.from_pretrained(make_model().bfloat16(), folder)
    return not any(param.requires_grad for param in model.parameters())


@row("the loss in eval mode")
def evaluates_the_loss(adapters: Adapters) -> bool:
    loss = adapters.llama().eval()(input_ids=TOKENS, labels=TOKENS).loss
    return is_close(loss, make_llama().eval()(input_ids=TOKENS, labels=TOKENS).loss)


@row("a loss that the orthogonality term does not reach, as in TRL's trainers")
def warns_of_no_regularization(adapters: Adapters) -> bool:
    messages = warnings_of(lambda: train(adapters.fresh()))
    return sum("regularization" in message for message in messages) == 1


@row("the loss of a replica of `DataParallel`")
def replicates(adapters: Adapters) -> bool:
    def broadcast(tensors, devices, detach=False):
        return [[tensor * 1 for tensor in tensors] for _ in devices]

    model = trained_by_hand(adapters.llama()).train()
    module = importlib.import_module("torch.nn.parallel.replicate")
    with mock.patch.object(module, "_broadcast_coalesced_reshape", broadcast):
        _, replica = nn.parallel.replicate(model, [0, 1])
    return is_close(*(each(input_ids=TOKENS, labels=TOKENS).loss for each in (replica, model)))


@row("what a base layer, or a hook on it, returns")
def leaves_outputs_alone(adapters: Adapters) -> bool:
    model, seen = trained_by_hand(adapters.fresh()), []
    adapted(model)[0].base_layer.register_forward_hook(lambda *args: seen.extend([args[-1], args[-1].clone()]))
    model(X)
    return torch.equal(*seen)


@row("a pruned adapter, with `load_adapter` and `from_pretrained` of transformers")
def loads_into_transformers(adapters: Adapters) -> bool:
    model = adapters.llama(deltaT=1)
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=2e-2)
    for step in range(20):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    loaded = make_llama()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded.load_adapter(folder)
    return is_close(loaded.eval()(TOKENS).logits, model.eval()(TOKENS).logits)


@row(
    "an adapter that is saved between two allocations, in the warm-up of a second run, or with the config of a "
    "pruned one"
)
def saves_what_predicts(adapters: Adapters) -> bool:
    model = train(adapters.fresh(deltaT=4), steps=13)  # the last step allocates
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=2e-2)
    nn.functional.mse_loss(model.train()(X), TARGET).backward()
    optimizer.step()
    return loads_as_saved(model)


@row("merging into one weight of two layers, or of a layer and an embedding")
def merges_into_shared(adapters: Adapters) -> bool:
    return merges_as_it_predicts(adapters.around(nn.Linear(10, 10), is_shared=True))


@row("merging into an expanded weight")
def merges_into_expanded(adapters: Adapters) -> bool:
    layer = nn.Linear(10, 8)
    layer.weight = nn.Parameter(layer.weight.detach()[:1].expand(8, 10))
    return merges_as_it_predicts(adapters.around(layer))


@row("a weight that is computed: `weight_norm`, `spectral_norm`, pruning, any parametrization")
def merges_into_computed(adapters: Adapters) -> bool:
    return merges_as_it_predicts(adapters.around(nn.utils.parametrizations.weight_norm(nn.Linear(10, 8))))


@row("a layer with a forward pass of its own, such as weight standardization")
def merges_into_standardized(adapters: Adapters) -> bool:
    return merges_as_it_predicts(adapters.around(WeightStandardizedConv2d(4, 6, 1)), torch.randn(2, 4, 5, 5))


@row("a fresh adapter over weights that accelerate keeps in CPU memory or on disk")
def predicts_offloaded(adapters: Adapters) -> bool:
    base = make_model()
    expected = base(X)
    cpu_offload(base, execution_device="cpu")
    return is_close(get_peft_model(base, adapters.config())(X), expected)


@row("saving an adapter beside a frozen one that is called like a module")
def saves_beside_another(adapters: Adapters) -> bool:
    model = train(adapters.fresh("sft"))
    model.add_adapter("up", adapters.config(inference_mode=True))
    return loads_as_saved(model, "sft")


@row("a frozen adapter that is called like a part of an adapter, such as `lora_E`, added to one in training")
def stays_trainable(adapters: Adapters) -> bool:
    model = adapters.fresh("sft")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.load_adapter(Path(folder, "sft"), "lora_E")
    return all(layer.lora_E["sft"].requires_grad for layer in adapted(model))


@row("loading a pruned adapter under a name that is part of a module's name")
def loads_under_the_name_of_a_module(adapters: Adapters) -> bool:
    return loads_as_saved(train(adapters.fresh()), load_as="up")


@row("the loss inside of `disable_adapter()` in training")
def disables_the_term(adapters: Adapters) -> bool:
    model = adapters.llama().train()
    with model.disable_adapter():
        return is_close(
            model(input_ids=TOKENS, labels=TOKENS).loss, make_llama()(input_ids=TOKENS, labels=TOKENS).loss
        )


@row("a layer whose weight the model reads without calling it")
def warns_of_a_layer_that_is_not_called(adapters: Adapters) -> bool:
    class ReadsWeight(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(nn.functional.linear(self.up(x), self.down.weight))

    torch.manual_seed(0)
    model = get_peft_model(ReadsWeight(), adapters.config())
    return any("'down'" in message for message in warnings_of(lambda: train(model)))


@row("`nn.TransformerEncoder` in eval mode")
def takes_no_fast_path(adapters: Adapters) -> bool:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(10, 2, 16, dropout=0.0, batch_first=True)
    base = Around(nn.TransformerEncoder(layer, 1))
    model = trained_by_hand(get_peft_model(base, adapters.config(target_modules=["linear1", "linear2"])))
    x = X[None]
    in_training = model.train()(x)
    with torch.no_grad():
        return is_close(model.eval()(x), in_training)


@row(
    "an adapter that is added with the config of the one in training, as by TRL's DPO, KTO and GRPO trainers",
)
def copies_a_reference(adapters: Adapters) -> bool:
    model = trained_by_hand(adapters.fresh())
    expected = model(X)
    model.add_adapter("ref", model.peft_config["default"])
    train(model)
    model.set_adapter("ref")
    return torch.equal(model.eval()(X), expected)


@row("`create_lorafa_optimizer`")
def trains_with_lorafa(adapters: Adapters) -> bool:
    model = adapters.fresh()
    optimizer = create_lorafa_optimizer(model, r=6, lora_alpha=12, lr=1e-3)
    model(X).sum().backward()
    optimizer.step()
    return True


@row("an adapter name that torch forbids, such as `keys` or `a.b`")
def is_called_keys(adapters: Adapters) -> bool:
    adapters.fresh("keys")
    return True


@row("loading into a base model with fewer layers")
def loads_into_a_smaller_model(adapters: Adapters) -> bool:
    base = make_model()
    del base.down
    with tempfile.TemporaryDirectory() as folder:
        adapters.fresh().save_pretrained(folder)
        PeftModel.from_pretrained(base, folder)
    return False  # the weights of that layer have been left out


@row("`target_r` above `init_r`")
def prunes_upwards(adapters: Adapters) -> bool:
    train(adapters.fresh(target_r=8))
    return True


@row("a first allocation after the budget phase")
def allocates_too_late(adapters: Adapters) -> bool:
    model = adapters.fresh()
    model(X).sum().backward()
    model.base_model.update_and_allocate(17)
    return True


@row(
    "options of LoRA that AdaLoRA does not read, such as `use_rslora`, `alpha_pattern`, `lora_bias`, "
    '`init_lora_weights="pissa"`'
)
def warns_of_options(adapters: Adapters) -> bool:
    return any("use_rslora" in message for message in warnings_of(lambda: adapters.fresh(use_rslora=True)))


def outcomes(use_dora_adaptive: bool) -> dict[str, bool | str]:
    """What comes of each row: whether it went right, or the name of the error."""
    found = {}
    for words, function in ROWS.items():
        try:
            found[words] = bool(function(Adapters(use_dora_adaptive)))
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            found[words] = type(error).__name__
    return found


if __name__ == "__main__":
    print(json.dumps(outcomes(use_dora_adaptive=False), indent=1))
