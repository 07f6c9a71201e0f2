"""Bugs of AdaLoRA in PEFT, one class for each of the patches beside this file, called like it.

They fail on the source distribution of PEFT, and pass with the patch.
"""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft import AdaLoraConfig, PeftModel, get_peft_model


TOTAL_STEP = 10
TOKENS = torch.randint(0, 60, (2, 8), generator=torch.Generator().manual_seed(0))


def make_llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)).to(dtype)


def make_config(**kwargs) -> AdaLoraConfig:
    schedule = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 3, "total_step": TOTAL_STEP}
    return AdaLoraConfig(**{"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **schedule, **kwargs})


def train(model: PeftModel, loss) -> None:
    optimizer = torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-2)
    for step in range(TOTAL_STEP):
        loss().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A pruned model, and the folder that it was saved in."""
    model = get_peft_model(make_llama(), make_config())
    train(model, lambda: model(input_ids=TOKENS, labels=TOKENS).loss)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return model.eval(), folder


class TestFrozenStaysFrozen:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_the_number_that_the_update_is_divided_by_is_not_trained(self, dtype):
        model = get_peft_model(make_llama(dtype), make_config())
        assert not any(param.requires_grad for name, param in model.named_parameters() if "ranknum" in name)
        assert all(param.requires_grad for name, param in model.named_parameters() if "lora_" in name)

    def test_an_adapter_that_was_loaded_to_predict_is_not_trained(self, trained):
        loaded = PeftModel.from_pretrained(make_llama(torch.bfloat16), trained[1])
        assert not any(param.requires_grad for param in loaded.parameters())


class TestExactNames:
    def test_an_adapter_can_be_called_like_a_module(self, tmp_path):
        def make_model() -> nn.Module:
            torch.manual_seed(0)
            return nn.ModuleDict({"default": nn.Linear(8, 8), "other": nn.Linear(8, 8)})

        model, x = (
            get_peft_model(make_model(), make_config(target_modules=["default", "other"], task_type=None)),
            torch.randn(5, 8),
        )

        def output(model: nn.Module) -> torch.Tensor:
            layers = model.base_model.model
            return layers["other"](layers["default"](x))

        train(model, lambda: output(model).square().sum())
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_model(), tmp_path)
        torch.testing.assert_close(output(loaded), output(model))

    def test_an_adapter_is_not_regularized_and_masked_with_another_of_which_the_name_begins_with_its_own(self):
        model = get_peft_model(make_llama(), make_config(), adapter_name="a")
        model.add_adapter("ab", make_config(inference_mode=True))
        with torch.no_grad():
            for name, param in model.named_parameters():
                if name.endswith("_E.ab"):
                    param.fill_(1)
        train(model, lambda: model(input_ids=TOKENS, labels=TOKENS).loss)
        assert all((param == 1).all() for name, param in model.named_parameters() if name.endswith("_E.ab"))


class TestLossWithoutTraining:
    def test_a_model_loaded_for_inference_computes_its_loss(self, trained):
        loaded = PeftModel.from_pretrained(make_llama(), trained[1])
        outputs = loaded(input_ids=TOKENS, labels=TOKENS)
        expected = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
        torch.testing.assert_close(outputs.loss, expected)


class TestLossInEvaluation:
    def test_it_is_that_of_the_model(self):
        model = get_peft_model(make_llama(), make_config())
        expected = make_llama()(input_ids=TOKENS, labels=TOKENS).loss
        torch.testing.assert_close(model.eval()(input_ids=TOKENS, labels=TOKENS).loss, expected)
        assert model.train()(input_ids=TOKENS, labels=TOKENS).loss > expected + 0.1


class TestResizeOnMeta:
    def test_a_pruned_adapter_can_be_loaded_with_little_memory(self, trained):
        model, folder = trained
        loaded = PeftModel.from_pretrained(make_llama(), folder, low_cpu_mem_usage=True).eval()
        torch.testing.assert_close(loaded(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


class TestGroupedConvolutions:
    @pytest.mark.parametrize("groups", [2, 4])
    def test_they_are_adapted(self, groups):
        torch.manual_seed(0)
        base, x = nn.Conv2d(4, 8, 3, groups=groups), torch.randn(2, 4, 6, 6)
        model = get_peft_model(nn.Sequential(base), make_config(target_modules=["0"], task_type=None))
        layer = model.base_model.model[0]
        nn.init.ones_(layer.lora_E["default"])
        weight = base.weight + layer.get_delta_weight("default")
        torch.testing.assert_close(model(x), nn.functional.conv2d(x, weight, base.bias, groups=groups))


class TestOrderOfCalls:
    def test_an_allocation_after_zero_grad_is_refused_with_the_order(self):
        model = get_peft_model(make_llama(), make_config())
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        model.zero_grad()
        with pytest.raises(ValueError, match="after `loss.backward\\(\\)` and before `optimizer.zero_grad\\(\\)`"):
            model.base_model.update_and_allocate(0)

    def test_a_layer_that_a_step_did_not_reach_counts_as_one_of_gradient_zero(self):
        model = get_peft_model(make_llama(), make_config())
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        unused = next(name for name, _ in model.base_model.model.named_parameters() if "lora_A" in name)
        model.base_model.model.get_parameter(unused).grad = None
        model.base_model.update_and_allocate(0)
        assert not model.base_model.rankallocator.exp_avg_ipt[unused].any()
