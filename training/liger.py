"""Liger's kernels for the backbone."""

from peft import PeftModel
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils import is_liger_kernel_available


def apply_liger_kernel_to_backbone(model: PreTrainedModel | PeftModel, kernel_config: dict[str, bool]) -> None:
    """Gives the backbone Liger's kernels; transformers would look for some of the whole model, and find none.

    The loss is not Liger's, which takes its gradient in the forward pass, before it is known what a token weighs.

    Args:
        kernel_config: Liger's names of kernels, and whether each is used.

    Raises:
        ImportError: without `liger-kernel`.
        ValueError: for a backbone that Liger has no kernels for, or if its fused loss is asked for.
    """
    backbone = unwrap_peft_model(model).backbone
    if kernel_config.get("fused_linear_cross_entropy"):
        raise ValueError(f"`liger_kernel_config` must be without fused_linear_cross_entropy, but got {kernel_config}")
    if is_liger_kernel_available():
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known

        if backbone.config.model_type not in known:
            raise ValueError(
                f"`use_liger_kernel` must be False for a backbone of type {backbone.config.model_type!r}: Liger has "
                f"kernels for {', '.join(sorted(known))}"
            )
    apply_liger_kernel(backbone, {"fused_linear_cross_entropy": False} | kernel_config)
