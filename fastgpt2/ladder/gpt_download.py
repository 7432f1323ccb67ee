"""Rung 13, the files: OpenAI's checkpoints as the book reads them, without TensorFlow."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from fastgpt2.errors import UserError
from fastgpt2.weights.hub import RELEASES, download_openai
from fastgpt2.weights.metadata import read_json
from fastgpt2.weights.openai import newest_checkpoint
from fastgpt2.weights.tf_bundle import Bundle


def download_and_load_gpt2(
    model_size: str, models_dir: str | Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """OpenAI's settings and parameters of a release, for ``load_weights_into_gpt``.

    Args:
        model_size: ``124M``, ``355M``, ``774M`` or ``1558M``.
        models_dir: the files go into its folder ``model_size``; those that are there are kept.

    Returns:
        ``hparams.json`` as a dictionary, and the parameters as nested dictionaries.

    Raises:
        UserError: an unknown size, a file that cannot be downloaded, or a damaged one.
    """
    names = {size: name for name, size in RELEASES.items()}
    if model_size not in names:
        raise UserError(f"model_size must be one of {', '.join(names)}, got {model_size!r}")
    folder = Path(models_dir) / model_size
    download_openai(names[model_size], folder)
    settings = read_json(folder / "hparams.json")
    return settings, load_gpt2_params_from_tf_ckpt(newest_checkpoint(folder), settings)


def load_gpt2_params_from_tf_ckpt(
    ckpt_path: str | Path, settings: dict[str, Any]
) -> dict[str, Any]:
    """The variables of a TensorFlow checkpoint as nested dictionaries of fp32 arrays.

    ``model/h3/attn/c_attn/w`` becomes ``params["blocks"][3]["attn"]["c_attn"]["w"]``; dimensions
    of size 1 are dropped.

    Args:
        ckpt_path: path of the checkpoint without ``.index`` and ``.data-*``.
        settings: OpenAI's ``hparams.json``; ``n_layer`` is read.

    Raises:
        UserError: a file is missing or damaged, or has more layers than the settings.
    """
    bundle = Bundle(Path(ckpt_path))
    params: dict[str, Any] = {"blocks": [{} for _ in range(settings["n_layer"])]}
    for name in bundle.entries:
        root, _, path = name.partition("/")
        if root != "model" or not path:
            # the optimizer's variables, a step counter
            continue
        first, *rest = path.split("/")
        target = params
        if first[:1] == "h" and first[1:].isdecimal():
            if int(first[1:]) >= settings["n_layer"]:
                raise UserError(f"{ckpt_path}: has {name}, but n_layer is {settings['n_layer']}")
            target = params["blocks"][int(first[1:])]
        # the first part says where, so model/ln_f/g is params["g"]
        *parents, leaf = rest or [first]
        for key in parents:
            target = target.setdefault(key, {})
        target[leaf] = np.squeeze(bundle.tensor(name).read().numpy())
    return params


def assign(left: Tensor, right: ArrayLike | Tensor) -> nn.Parameter:
    """A parameter with the values of ``right``, after a look at its shape.

    Args:
        left: the parameter that it takes the place of.
        right: an array or tensor of the same shape.

    Raises:
        UserError: the shapes differ.
    """
    values = right.detach().clone() if isinstance(right, Tensor) else torch.tensor(right)
    if left.shape != values.shape:
        raise UserError(
            f"assign: shapes differ: left is {tuple(left.shape)}, right {tuple(values.shape)}"
        )
    return nn.Parameter(values)
