"""Liger kernels for the backbone."""

from peft import PeftModel
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils import is_liger_kernel_available


def apply_liger_kernel_to_backbone(model: PreTrainedModel | PeftModel, kernel_config: dict[str, bool]) -> None:
    """Apply Liger kernels to the backbone. transformers looks them up by the type of the whole model, and finds none.

    Liger's fused loss is not used: it computes the gradient in the forward pass, before the token weights are known.

    Args:
        kernel_config: names of Liger kernels, and whether to use each.

    Raises:
        ImportError: if `liger-kernel` is not installed.
        ValueError: if Liger does not support the backbone, or if `kernel_config` requests the fused loss.
    """
    backbone = unwrap_peft_model(model).backbone
    if kernel_config.get("fused_linear_cross_entropy"):
        raise ValueError(f"`liger_kernel_config` must be without fused_linear_cross_entropy, but got {kernel_config}")
    if is_liger_kernel_available():
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known

        if backbone.config.model_type not in known:
            raise ValueError(
                f"`use_liger_kernel` must be False for a backbone of type {backbone.config.model_type!r}: Liger "
                f"supports {', '.join(sorted(known))}"
            )
    apply_liger_kernel(backbone, {"fused_linear_cross_entropy": False} | kernel_config)
