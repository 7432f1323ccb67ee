"""``python -m fastgpt2.evaluate.harness``: lm-eval's command, with a model called fastgpt2.

It is lm-eval's ``hf`` model, except that our drop-in class reads the weights.
"""

import sys

try:
    from lm_eval.__main__ import cli_evaluate  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from lm_eval.api.registry import register_model  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found,import-untyped,unused-ignore]
except ImportError as error:
    raise SystemExit(
        f"fastgpt2.evaluate.harness: needs lm-eval ({error}): pip install 'lm_eval[hf]'"
    ) from None

from fastgpt2.integrations.huggingface import GPT2LMHeadModel


@register_model("fastgpt2")
class HarnessModel(HFLM):  # type: ignore[misc]
    """lm-eval's Hugging Face model, on our kernels."""

    AUTO_MODEL_CLASS = GPT2LMHeadModel


def main() -> None:
    """lm-eval's own entry point, which reads ``sys.argv``."""
    sys.argv[0] = "python -m fastgpt2.evaluate.harness"
    cli_evaluate()


if __name__ == "__main__":
    main()
