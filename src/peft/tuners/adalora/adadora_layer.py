# Copyright 2026-present the HuggingFace Inc. team.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import nn

from peft.utils.integrations import gather_params_ctx

from .adadora import (
    Memo,
    add_update_and_scale,
    add_update_and_scale_,
    magnitude_scale,
    merge_rows,
    scale_output,
    squared_adapted_row_norm,
    squared_row_norm,
)
from .base_weight import check_overwrite, overwrite_weight, quantization, stored_tensors, weight_rows
from .config import AdaLoraConfig
from .sharding import copy_whole_, is_partitioned, whole


class AdaDoraMixin:
    """
    What makes an AdaLoRA layer an AdaDoRA layer. It goes in front of the layer's other base classes, and leaves to
    them what concerns adapters without a magnitude.

    `lora_magnitude` holds the magnitudes, one of shape (out, 1) per AdaDoRA adapter.
    """

    # how torchao quantized the model, for merging
    torchao_config: Any = None

    @property
    def use_dora_adaptive(self) -> bool:
        """Whether an adapter of this layer is AdaDoRA; the keys of `lora_magnitude` say which."""
        return len(self.lora_magnitude) > 0

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: AdaLoraConfig, **kwargs) -> None:
        learned = self.take_magnitude(adapter_name)
        try:
            super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)
        except Exception:
            self.give_magnitude(adapter_name, learned)
            raise
        self.give_magnitude(adapter_name, learned, config)

    def take_magnitude(self, adapter_name: str) -> Optional[nn.Parameter]:
        """Remove the magnitude of an adapter, if it has one, so that updating the layer leaves it as it is."""
        magnitudes = getattr(self, "lora_magnitude", {})
        return magnitudes.pop(adapter_name) if adapter_name in magnitudes else None

    def give_magnitude(
        self, adapter_name: str, learned: Optional[nn.Parameter], config: Optional[AdaLoraConfig] = None
    ) -> None:
        """Put a learned magnitude back or, if there is none, make the one that the config asks for."""
        self.clear_memos()
        if learned is not None:
            self.lora_magnitude[adapter_name] = learned
        elif config is not None and config.use_dora_adaptive:
            lora_E = self.lora_E[adapter_name]
            magnitude = torch.empty(self.out_features, 1, device=lora_E.device, dtype=lora_E.dtype)
            self.lora_magnitude[adapter_name] = nn.Parameter(magnitude, requires_grad=lora_E.requires_grad)
            self.reset_magnitude(adapter_name)
        if adapter_name in self.lora_magnitude:
            self.ranknum[adapter_name].requires_grad_(False)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: Optional[torch.device] = None) -> None:
        """As PEFT's, which also casts to the dtype of the weight, but a magnitude keeps its own."""
        magnitude = self.take_magnitude(adapter_name)
        if magnitude is None:
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)
            return
        with frozen_stays_frozen([self], adapter_name):
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        magnitude.data = magnitude.data.to(self.lora_E[adapter_name].device)
        self.give_magnitude(adapter_name, magnitude)

    def clear_memos(self) -> None:
        """Forget what was computed from the weights. Only needed after a write of your own through `.data`."""
        self._base_norm_memo = Memo()
        self._eval_memo = Memo()

    def reset_lora_parameters(self, adapter_name: str) -> None:
        super().reset_lora_parameters(adapter_name)
        if adapter_name in self.lora_magnitude:
            self.reset_magnitude(adapter_name)

    @torch.no_grad()
    def reset_magnitude(self, adapter_name: str) -> None:
        """Set the magnitude of an adapter to the row norm of the base weight. Does nothing on the meta device."""
        magnitude = self.lora_magnitude[adapter_name]
        if not magnitude.is_meta:
            copy_whole_(magnitude, self._base_row_norm())

    @torch.no_grad()
    def restore_magnitude_precision(self, adapter_name: str) -> None:
        """Give a fresh magnitude that was rounded to a low precision weight's dtype the precision of its own dtype.

        PEFT creates adapter weights in the dtype of the base weight and upcasts them afterwards. A magnitude that
        differs from what the row norm of the base weight is rounded to has been trained, and is left alone.
        """
        dtype = self.get_base_layer().weight.dtype
        if dtype.is_floating_point:
            self._undo_rounding(adapter_name, dtype)

    @torch.no_grad()
    def upcast_quantized_magnitudes(self) -> None:
        """
        Give magnitudes of a quantized weight that were cast to a low precision float32 again.

        TRL's trainers cast all of an adapter over quantized weights to bfloat16 but for magnitudes with LoRA's name
        for them. There the steps of an optimizer are smaller than those from one number to the next, so that a
        magnitude stays as it is (https://github.com/huggingface/trl/issues/7268).
        """
        if quantization(self.get_base_layer()) is None:
            return
        for adapter_name, magnitude in self.lora_magnitude.items():
            dtype = magnitude.dtype
            if dtype.itemsize < 4:
                magnitude.data = magnitude.data.float()
                self._undo_rounding(adapter_name, dtype)

    def _undo_rounding(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Set a magnitude to the row norm of the base weight if that, rounded to a dtype, is what it is."""
        magnitude = self.lora_magnitude[adapter_name]
        if magnitude.is_meta or magnitude.dtype == dtype:
            return
        norm = self._base_row_norm()
        if torch.equal(norm.to(dtype).to(magnitude.dtype), magnitude):
            magnitude.copy_(norm)

    @torch.no_grad()
    def magnitude_drift(self, adapter_name: str) -> torch.Tensor:
        """
        By how much of its initial value each magnitude has changed, of shape (rows whose base weight is not zero,).
        """
        norm = self._base_row_norm()
        change = (whole(self.lora_magnitude[adapter_name]).to(norm.dtype) - norm).abs() / norm
        return change[norm > 0]

    def _base_row_norm(self) -> torch.Tensor:
        base_layer = self.get_base_layer()
        weight = base_layer.weight
        with gather_params_ctx(weight):
            for adapter_name in self.merged_adapters:
                if adapter_name not in self.lora_magnitude:
                    weight = weight - self.get_delta_weight(adapter_name)
            return squared_row_norm(weight_rows(base_layer, whole(weight))).sqrt()

    @torch.no_grad()
    def keep_ranks(self, adapter_name: str, kept: torch.Tensor) -> None:
        """
        Drop all singular triplets of an adapter but some. Scaling, dtype, device and `requires_grad` stay as they are.

        Args:
            adapter_name (`str`):
                The adapter.
            kept (`torch.Tensor`):
                Indices of the triplets to keep, int64.
        """
        for params, dim in ((self.lora_A, 0), (self.lora_E, 0), (self.lora_B, 1)):
            param = params[adapter_name]
            values = param.index_select(dim, kept.to(param.device))
            params[adapter_name] = nn.Parameter(values, requires_grad=param.requires_grad)
        self.r[adapter_name] = len(kept)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_names, str):
            self.check_only_adapter(adapter_names)
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def check_only_adapter(self, adapter_names: list[str]) -> None:
        """Raise a `NotImplementedError` if an AdaDoRA adapter is to be used together with another one."""
        if len(adapter_names) < 2:
            return
        for adapter_name in adapter_names:
            if adapter_name in self.lora_magnitude:
                raise NotImplementedError(
                    f"The AdaDoRA adapter {adapter_name!r} cannot be used together with another one but got "
                    f"{list(adapter_names)}; choose one of them."
                )

    def update_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A, c · E and B of the update ΔW = B (c · E ⊙ A), c · E in float32 at least."""
        ranknum = self.ranknum[adapter_name]
        if ranknum.dtype.itemsize < 4:
            ranknum = ranknum.float()
        scaled_E = self.lora_E[adapter_name] * (self.scaling[adapter_name] / (ranknum + 1e-5))
        return self.lora_A[adapter_name], scaled_E, self.lora_B[adapter_name]

    def adadora_adapter(self, adapter_names: list[str]) -> Optional[str]:
        """
        The adapter among `adapter_names` that is AdaDoRA, or `None` if there is none in this layer.

        Raises:
            `NotImplementedError`: If there is one and it is not the only adapter of this layer among them.
        """
        names = [name for name in adapter_names if name in self.lora_A]
        self.check_only_adapter(names)
        return names[0] if names and names[0] in self.lora_magnitude else None

    def adapter_to_merge(self, adapter_names: Optional[list[str]]) -> Optional[str]:
        """The AdaDoRA adapter that `merge` would merge, or `None` if there is none. Raises as `merge` does."""
        if adapter_names is None:
            adapter_names = self.active_adapters
        if isinstance(adapter_names, str):
            return None
        adapter_name = self.adadora_adapter(list(dict.fromkeys([*self.merged_adapters, *adapter_names])))
        if adapter_name is None or adapter_name in self.merged_adapters:
            return None
        check_overwrite(self.get_base_layer(), self.torchao_config)
        return adapter_name

    def _merged_rows(self, adapter_name: str) -> Iterator[tuple[slice, torch.Tensor]]:
        base_layer = self.get_base_layer()
        rows = weight_rows(base_layer, whole(base_layer.weight))
        factors = (*self.update_factors(adapter_name), self.lora_magnitude[adapter_name])
        return merge_rows(rows, *(whole(factor) for factor in factors))

    def check_merge_is_finite(self, adapter_name: str) -> None:
        """Raise a `ValueError` if the merged weight of an AdaDoRA adapter has a value that is not finite."""
        for _, values in self._merged_rows(adapter_name):
            if not torch.isfinite(values).all():
                raise ValueError(
                    f"The merged weight of adapter {adapter_name!r} is not finite, so the adapter seems to be broken; "
                    "nothing was merged."
                )

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """
        Merge the active adapter weights into the base weights. An AdaDoRA adapter cannot be unmerged afterwards.

        Args:
            safe_merge (`bool`, *optional*):
                Whether to check that the merged weight is finite before the base weight is changed.
            adapter_names (`list[str]`, *optional*):
                The names of the adapters to merge. If `None`, all active adapters are merged.

        Raises:
            `NotImplementedError`:
                If an AdaDoRA adapter would be merged together with another adapter, or into a weight of torchao
                without `torchao_config`.
            `ValueError`:
                If `safe_merge=True` and the merged weight is not finite.
        """
        if not self.merge_adadora(safe_merge, adapter_names):
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def merge_adadora(self, safe_merge: bool, adapter_names: Optional[list[str]]) -> bool:
        """
        Merge if it is an AdaDoRA adapter that `merge` has to merge, and tell whether it is. Raises as `merge` does.
        """
        adapter_name = self.adapter_to_merge(adapter_names)
        self.clear_memos()
        if adapter_name is None:
            return False
        if safe_merge:
            self.check_merge_is_finite(adapter_name)
        overwrite_weight(self.get_base_layer(), self._merged_rows(adapter_name), self.torchao_config)
        self.merged_adapters.append(adapter_name)
        return True

    def unmerge(self) -> None:
        """
        Unmerge all merged adapters from the base weights.

        Raises:
            `NotImplementedError`: If an AdaDoRA adapter is merged.
        """
        self.check_unmerge()
        self.clear_memos()
        super().unmerge()

    def check_unmerge(self) -> None:
        """Raise a `NotImplementedError` if an AdaDoRA adapter is merged."""
        for adapter_name in self.merged_adapters:
            if adapter_name in self.lora_magnitude:
                raise NotImplementedError(
                    f"The AdaDoRA adapter {adapter_name!r} cannot be unmerged, because rescaled and rounded rows do "
                    "not give the base weight back; reload the base model."
                )

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = self.adadora_forward(x, *args, **kwargs)
        return super().forward(x, *args, **kwargs) if output is None else output

    def adadora_forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Optional[torch.Tensor]:
        """The output of the layer if its active adapter is AdaDoRA, or if one is merged; `None` if not."""
        if self.disable_adapters:
            self.check_unmerge()
            return None
        if any(name in self.lora_magnitude for name in self.merged_adapters):
            return self.base_layer(x, *args, **kwargs)
        adapter_name = None if self.merged else self.adadora_adapter(self.active_adapters)
        if adapter_name is None:
            return None
        output = self.base_layer(x, *args, **kwargs)
        x = self.lora_dropout[adapter_name](self._cast_input_dtype(x, self.lora_A[adapter_name].dtype))
        return self._adapt(output, x, adapter_name)

    def _adapt(self, output: torch.Tensor, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """The output h of the layer, given that of the base layer and the input after dropout."""
        params = self._adapter_params(adapter_name)
        lora_A, _, lora_B, magnitude = params
        bias = self.get_base_layer().bias
        needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (output, x, *params))
        projected = nn.functional.linear(x, lora_A)
        if needs_grad or torch.compiler.is_compiling():
            _, scaled_E, _ = self.update_factors(adapter_name)
            projected = (projected * scaled_E.T).to(projected.dtype)
            squared_norm = self._squared_norm(lora_A, scaled_E, lora_B)
            return add_update_and_scale(output, projected, lora_B, magnitude, squared_norm, bias)

        scaled_E, scale = self._scaled_E_and_scale(adapter_name, params)
        projected = projected.mul_(scaled_E.T)
        return add_update_and_scale_(output, projected, lora_B, scale, bias)

    def _adapter_params(self, adapter_name: str) -> list[nn.Parameter]:
        """A, E, B and m."""
        return [part[adapter_name] for part in (self.lora_A, self.lora_E, self.lora_B, self.lora_magnitude)]

    def _squared_norm(self, lora_A: torch.Tensor, scaled_E: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
        base_layer = self.get_base_layer()
        if is_partitioned(base_layer.weight):
            return squared_adapted_row_norm(
                weight_rows(base_layer, whole(base_layer.weight)), lora_A, scaled_E, lora_B
            )
        rows = weight_rows(base_layer)
        squared_base_norm = None
        if not torch.compiler.is_compiling():
            squared_base_norm = self._base_norm_memo.get(
                lambda: squared_row_norm(rows), tuple(stored_tensors(base_layer.weight))
            )
        return squared_adapted_row_norm(rows, lora_A, scaled_E, lora_B, squared_base_norm)

    def _scaled_E_and_scale(self, adapter_name: str, params: list[nn.Parameter]) -> tuple[torch.Tensor, torch.Tensor]:
        """c · E and m / n of an adapter that needs no gradients, kept in eval mode."""

        def compute() -> tuple[torch.Tensor, torch.Tensor]:
            lora_A, scaled_E, lora_B = self.update_factors(adapter_name)
            squared_norm = self._squared_norm(lora_A, scaled_E, lora_B)
            return scaled_E, magnitude_scale(self.lora_magnitude[adapter_name], squared_norm)

        weight = self.get_base_layer().weight
        if self.training or getattr(self, "_is_fsdp_managed_module", False) or is_partitioned(weight):
            # FSDP2 and ZeRO-3 gather parameters for the forward pass into tensors that do not count it
            return compute()
        tensors = (*stored_tensors(weight), *params, self.ranknum[adapter_name])
        return self._eval_memo.get(compute, tensors, adapter_name, self.scaling[adapter_name])

    def train(self, mode: bool = True) -> "AdaDoraMixin":
        if mode:
            self._eval_memo.clear()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> "AdaDoraMixin":
        self.clear_memos()
        return super()._apply(*args, **kwargs)


@contextmanager
def frozen_stays_frozen(layers: list[AdaDoraMixin], adapter_name: str) -> Iterator[None]:
    """PEFT replaces what it casts by parameters that are trained, even the initial rank, which is not saved."""
    frozen = []
    for layer in layers:
        parts = (layer.lora_A, layer.lora_E, layer.lora_B, layer.lora_magnitude, layer.ranknum)
        frozen += [part for part in parts if adapter_name in part and not part[adapter_name].requires_grad]
    yield
    for part in frozen:
        part[adapter_name].requires_grad_(False)


class AdaDoraConv2dMixin(AdaDoraMixin):
    """
    AdaDoRA for a convolution, whose weight counts as a matrix of shape (out, in · kernel height · kernel width).

    The update is the product of two convolutions: one like the layer's with A, (r, in, kernel height, kernel width),
    as its weight, and behind it one of size 1×1 with B. With several groups, A applies to the inputs of each group.
    """

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: AdaLoraConfig, **kwargs) -> None:
        base_layer = self.get_base_layer()
        # of which AdaLoRA takes the shape of A; it would not fit the weight of a layer with several groups
        self.in_features = base_layer.in_channels // base_layer.groups
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)

    def _adapt(self, output: torch.Tensor, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        base_layer = self.get_base_layer()
        lora_A, scaled_E, lora_B = self.update_factors(adapter_name)
        if len(lora_A) > 0:
            groups = base_layer.groups
            kernel = lora_A.view(-1, *base_layer.weight.shape[1:]).repeat(groups, 1, 1, 1)
            projected = base_layer._conv_forward(x, kernel, None)
            projected = (projected * scaled_E.repeat(groups, 1).unsqueeze(1)).to(projected.dtype)
            update = nn.functional.conv2d(projected, lora_B[:, :, None, None], groups=groups)
            adapted = output + update
        else:
            adapted = output
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            scale = magnitude_scale(self.lora_magnitude[adapter_name], self._squared_norm(lora_A, scaled_E, lora_B))
        else:
            _, scale = self._scaled_E_and_scale(adapter_name, self._adapter_params(adapter_name))
        # features last and back
        scaled = scale_output(adapted.movedim(-3, -1), scale, base_layer.bias).movedim(-1, -3)
        return scaled.to(output.dtype)
