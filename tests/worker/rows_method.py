"""A quantisation method of one's own, in one file: int8 with a scale a row, made after the weights are loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pytest_llmload.quantisation import Method, Scheme, Stored


@dataclass(frozen=True, eq=False)
class StoredRows(Stored):
    """One value a byte, one scale a row."""

    scales: Any = None

    @property
    def bits(self) -> float:
        return 8.0

    @property
    def max_error(self) -> float | None:
        return 0.5 / 127 + 0.003

    def describe(self) -> str:
        return f"rows-int8 scale={str(self.scales.dtype).removeprefix('torch.')}"

    def statistics(self) -> Iterator[tuple[str, Any]]:
        yield "scales", self.scales

    def dequantised(self, start: int, stop: int) -> Any:
        columns = self.shape[-1]
        first, last = start // columns, -(-stop // columns)
        rows = self.data[first:last].float() * self.scales[first:last]
        return rows.reshape(-1)[start - first * columns : stop - first * columns].cpu()

    def rounded(self, values: Any) -> Any:
        rows = values.reshape(-1, self.shape[-1])
        scales = rows.abs().amax(dim=1, keepdim=True) / 127
        return ((rows / scales).round() * scales).reshape(values.shape)


class Rows(Method):
    """Quantises every Linear of the decoder, after its weights are loaded."""

    name = "rows"
    summary = "int8 with a scale a row."
    schemes = (Scheme("rows-int8", "Rows in 8 bit.", 8),)
    file_methods = ("rows",)
    runs_on = "CPU"
    held_as = "buffers"
    proved = "values"

    def config(self, job: Any, scheme: str, skips: tuple[str, ...]) -> Any:
        return _register()()

    def read(self, module: Any) -> Iterable[Stored]:
        if "codes" in module._buffers:
            codes = module._buffers["codes"]
            yield StoredRows(
                "rows-int8", tuple(codes.shape), codes, ("codes", "scales"), scales=module._buffers["scales"]
            )

    def planned(self, module: Any, weight: Any, *, replaced: bool, config: Any) -> dict[str, int] | None:
        pending = type(module).__name__ == "PendingRows"
        return {"": weight.numel(), ".scales": 4 * weight.shape[0]} if pending else None

    def why_dense(self, module: Any) -> str:
        return "rows left it alone"


def _register() -> Any:
    """Make transformers know the method: its config, and the quantiser that replaces modules."""
    import torch
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    if "rows" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        return auto.AUTO_QUANTIZATION_CONFIG_MAPPING["rows"]

    class RowsLinear(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, linear: Any) -> None:
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            weight = linear.weight.detach().float()
            scales = weight.abs().amax(dim=1, keepdim=True) / 127
            self.register_buffer("codes", (weight / scales).round().to(torch.int8))
            self.register_buffer("scales", scales)

        def forward(self, inputs: Any) -> Any:
            return torch.nn.functional.linear(inputs, (self.codes * self.scales).to(inputs.dtype))

    class PendingRows(torch.nn.Linear):  # type: ignore[misc]
        """A Linear that is quantised once its weight is there."""

    class RowsConfig(QuantizationConfigMixin):  # type: ignore[misc]
        def __init__(self, **kwargs: Any) -> None:
            self.quant_method = "rows"

    class RowsQuantizer(HfQuantizer):  # type: ignore[misc]
        requires_calibration = False

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            for path, module in model.named_modules():
                if path.endswith("_proj"):
                    module.__class__ = PendingRows

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
            for path, module in list(model.named_modules()):
                if isinstance(module, PendingRows):
                    parent = model.get_submodule(path.rpartition(".")[0])
                    setattr(parent, path.rpartition(".")[2], RowsLinear(module))

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return False

    auto.register_quantization_config("rows")(RowsConfig)
    auto.register_quantizer("rows")(RowsQuantizer)
    return RowsConfig
