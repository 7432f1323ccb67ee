"""The drop-in class against the class it stands in for: surface, outputs, loading and saving."""

import copy
import inspect
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fastgpt2
from fastgpt2 import kernels
from fastgpt2.integrations import transformers_attention
from tests.integrations.tiny_hf import PAD, assert_close, config, padding, pair, randomised, tokens

T = 9
LEFT = padding(T, (4, T), (0, T), (1, T))
RIGHT = padding(T, (0, 5), (0, T), (0, 1))
HOLES = LEFT * RIGHT.flip(1)
HOLES[1, 4] = 0


def test_it_is_theirs_by_name_signature_and_keys() -> None:
    theirs, ours = pair()
    assert type(ours).__name__ == "GPT2LMHeadModel"
    assert issubclass(type(ours), transformers.GPT2LMHeadModel)
    assert inspect.signature(type(ours).forward) == inspect.signature(type(theirs).forward)
    assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)
    ours_shapes = {k: v.shape for k, v in ours.state_dict().items()}
    assert ours_shapes == {k: v.shape for k, v in theirs.state_dict().items()}
    assert ours.transformer.h[0].attn.c_attn.weight.shape == (24, 72)
    assert ours.lm_head.weight is ours.transformer.wte.weight
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]


ODD: dict[str, dict[str, Any]] = {
    "plain": {},
    "one head": {"n_head": 1},
    "relu": {"activation_function": "relu"},
    "pytorch tanh": {"activation_function": "gelu_pytorch_tanh"},
    "inner width": {"n_inner": 19},
    "inverse layer scaling": {"scale_attn_by_inverse_layer_idx": True},
    "no scaling": {"scale_attn_weights": False},
    "upcast": {"reorder_and_upcast_attn": True},
    "upcast eager": {"reorder_and_upcast_attn": True, "attn_implementation": "eager"},
    "untied": {"tie_word_embeddings": False},
    "epsilon": {"layer_norm_epsilon": 1e-2},
}


@pytest.mark.parametrize("fields", ODD.values(), ids=ODD)
@pytest.mark.parametrize(
    "mask", [None, LEFT, RIGHT, HOLES], ids=["whole", "left", "right", "holes"]
)
def test_logits_and_loss_are_theirs(fields: dict[str, Any], mask: Tensor | None) -> None:
    theirs, ours = pair(**fields)
    ids = tokens(3, T)
    expected, got = (m(ids, attention_mask=mask, labels=ids) for m in (theirs, ours))
    # a padded position that sees no key has no defined output, there as here
    seen = torch.ones_like(ids) if mask is None else mask.cumsum(1)
    assert_close(got.logits[seen > 0], expected.logits[seen > 0])
    if mask is None or mask is RIGHT:
        assert_close(got.loss, expected.loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", [None, LEFT, RIGHT], ids=["whole", "left", "right"])
def test_eager_is_sdpa_is_ours_at_run_time(dtype: torch.dtype, mask: Tensor | None) -> None:
    _, ours = pair()
    exact = ours(tokens(3, T), attention_mask=mask).logits
    ours.to(dtype)
    logits = {}
    for name in ("eager", "sdpa", "fastgpt2"):
        ours.set_attn_implementation(name)
        assert ours.config._attn_implementation == name
        logits[name] = ours(tokens(3, T), attention_mask=mask).logits
        assert logits[name].dtype == dtype
    seen = torch.ones(3, T) if mask is None else mask
    errors = {n: (x.float() - exact)[seen > 0].abs().max().item() for n, x in logits.items()}
    # no further from fp32 than the others are, up to a rounding or two of logits about 5 wide
    ulp = torch.finfo(dtype).eps * 8
    assert errors["fastgpt2"] <= max(errors["eager"], errors["sdpa"]) + 2 * ulp, errors


def test_the_kernel_runs_where_explain_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    kernel = kernels.attention

    def spy(qkv: Tensor, **options: Any) -> Tensor:
        calls.append((qkv.data_ptr(), options["key_range"]))
        return kernel(qkv, **options)

    monkeypatch.setattr(transformers_attention, "attention", spy)
    _, ours = pair()
    ids = tokens(3, T)

    def count(**inputs: Any) -> int:
        calls.clear()
        ours(ids, **inputs)
        return len(calls)

    assert count() == 2 and calls[1][1] is None
    assert count(attention_mask=torch.ones_like(ids)) == 2 and calls[0][1] is None
    assert count(attention_mask=LEFT) == 2
    key_range: Any = calls[0][1]
    assert key_range.tolist() == [[4, T], [0, T], [1, T]]
    assert count(attention_mask=RIGHT) == 2
    assert count(attention_mask=HOLES) == 0
    # the caller's own 4-D masks: causal, then made a window in place
    mask = torch.ones(3, 1, T, T).tril().bool()
    assert count(attention_mask=mask) == 2
    mask &= mask.triu(-3)
    assert count(attention_mask=mask) == 0
    assert count(attention_mask=mask.float()) == 0
    with torch.inference_mode():
        assert count(attention_mask=LEFT) == 2 and count(attention_mask=HOLES) == 0
    assert count(position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), use_cache=False) == 0
    ours.set_attn_implementation("eager")
    assert count() == 0


def test_attention_takes_the_projection_as_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = pair()
    projected: list[int] = []
    taken: list[int] = []
    kernel = kernels.attention
    for block in ours.transformer.h:
        block.attn.c_attn.register_forward_hook(lambda *a: projected.append(a[2].data_ptr()))

    def spy(qkv: Tensor, **options: Any) -> Tensor:
        taken.append(qkv.data_ptr())
        return kernel(qkv, **options)

    monkeypatch.setattr(transformers_attention, "attention", spy)
    ours(tokens(), use_cache=False)
    assert taken == projected and len(taken) == 2


def test_every_other_input_and_output_is_theirs() -> None:
    theirs, ours = pair()
    ids = tokens(3, T)
    embeds = torch.randn(3, T, 24, generator=torch.Generator().manual_seed(2))
    additive = torch.zeros(3, 1, T, T).masked_fill(~torch.ones(T, T).tril().bool(), -1e9)
    requests: list[dict[str, Any]] = [
        {"input_ids": ids, "token_type_ids": tokens(3, T, seed=5)},
        {"inputs_embeds": embeds},
        {"input_ids": ids, "position_ids": torch.arange(3, 3 + T)[None]},
        {"input_ids": ids, "attention_mask": torch.ones(3, 1, T, T).tril().bool()},
        {"input_ids": ids, "attention_mask": additive},
        {"input_ids": ids, "logits_to_keep": 2},
        {"input_ids": ids, "logits_to_keep": torch.tensor([1, 4])},
        {"input_ids": ids, "output_hidden_states": True},
        {"input_ids": ids[:, :1]},
        {"input_ids": ids[:1]},
    ]
    for request in requests:
        expected, got = theirs(**request), ours(**request)
        assert got.keys() == expected.keys()
        assert_close(got.logits, expected.logits)
        if "output_hidden_states" in request:
            assert_close(got.hidden_states, expected.hidden_states)
    expected, got = (m(ids, labels=ids, return_dict=False) for m in (theirs, ours))
    assert isinstance(got, tuple) and len(got) == len(expected)
    assert_close(got[:2], expected[:2])
    for model in (theirs, ours):
        model.set_attn_implementation("eager")
    expected, got = (m(ids, output_attentions=True).attentions for m in (theirs, ours))
    assert len(got) == 2
    assert_close(got, expected)


def test_cross_attention() -> None:
    theirs, ours = pair(add_cross_attention=True)
    encoded = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(2))
    encoder_mask = padding(5, (0, 3), (0, 5), (0, 1))
    expected, got = (
        m(tokens(), encoder_hidden_states=encoded, encoder_attention_mask=encoder_mask).logits
        for m in (theirs, ours)
    )
    assert_close(got, expected)


def test_cache_continues_as_theirs_and_nothing_returned_is_overwritten() -> None:
    theirs, ours = pair()
    ids = tokens(3, T)
    first = ours(ids[:, :6])
    kept_logits = first.logits.clone()
    early_keys = [layer.keys for layer in first.past_key_values.layers]
    kept_keys = [keys.clone() for keys in early_keys]
    second = ours(ids[:, 6:], past_key_values=first.past_key_values)
    assert_close(second.logits, theirs(ids).logits[:, 6:])
    ours(tokens(seed=9))
    assert torch.equal(first.logits, kept_logits)
    assert all(torch.equal(a, b) for a, b in zip(early_keys, kept_keys, strict=True))


def test_changed_weights_take_effect_at_once() -> None:
    theirs, ours = pair()
    ids = tokens()

    def in_place(m: Any) -> None:
        with torch.no_grad():
            m.transformer.h[0].attn.c_attn.weight.mul_(1.5)

    def through_data(m: Any) -> None:
        m.transformer.h[1].mlp.c_fc.weight.data = m.transformer.h[1].mlp.c_fc.weight.data * 0.5

    def optimizer(m: Any) -> None:
        m(ids, labels=ids).loss.backward()
        torch.optim.SGD(m.parameters(), lr=0.1).step()

    def loading(m: Any) -> None:
        other = randomised(transformers.GPT2LMHeadModel(config()), seed=7)
        m.load_state_dict(other.state_dict())

    def assigning(m: Any) -> None:
        m.transformer.ln_f.weight = nn.Parameter(torch.full((24,), 0.3))

    before = ours(ids).logits
    for change in (in_place, through_data, optimizer, loading, assigning):
        change(theirs)
        change(ours)
        now = ours(ids).logits
        assert_close(now, theirs(ids).logits)
        assert not torch.allclose(now, before, atol=1e-2), change.__name__
        before = now


def test_hooks_and_replaced_submodules_act() -> None:
    ids = tokens()
    block = ("ln_1", "attn", "attn.c_attn", "mlp.act", "mlp.c_fc")
    places = ["transformer.ln_f", "lm_head", *(f"transformer.h.1.{name}" for name in block)]

    def double(_module: Any, _inputs: Any, out: Any) -> Any:
        return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out

    for place in places:
        theirs, ours = pair()
        for model in (theirs, ours):
            model.get_submodule(place).register_forward_hook(double)
        assert_close(ours(ids).logits, theirs(ids).logits, atol=2e-4)
    theirs, ours = pair()
    plain = ours(ids).logits
    for model in (theirs, ours):
        model.transformer.h[0].ln_2 = nn.Identity()
        model.transformer.h[1].mlp.act = nn.ReLU()
    assert_close(ours(ids).logits, theirs(ids).logits)
    assert not torch.allclose(ours(ids).logits, plain, atol=1e-2)
    explained = ours.explain()
    assert "4 of 4" in explained and "1 of 2" in explained and "ReLU" in explained


def test_a_replaced_attention_is_handed_transformers_own_mask() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor, *_: Any, attention_mask: Tensor, **__: Any) -> Any:
            masks.append(attention_mask)
            return x, None

    masks: list[Tensor] = []
    for model in pair():
        model.transformer.h[0].attn = Attention()
        model(tokens(3, T), attention_mask=LEFT, use_cache=False)
    assert masks[1].shape == (3, 1, T, T) and torch.equal(masks[1], masks[0])


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    theirs, ours = pair()
    ids = tokens()
    ours.save_pretrained(tmp_path)
    assert "fastgpt2" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert_close(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, theirs(ids).logits
    )
    load: Any = fastgpt2.GPT2LMHeadModel.from_pretrained
    again, report = load(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    # the name that programs look for; ours answers to it
    assert again.config._attn_implementation == "sdpa" and "in place of sdpa" in again.explain()
    assert again.lm_head.weight is again.transformer.wte.weight
    assert_close(again(ids).logits, theirs(ids).logits)
    half = load(tmp_path, dtype=torch.bfloat16)
    assert half(ids).logits.dtype == torch.bfloat16
    for name in ("eager", "sdpa", "fastgpt2"):
        asked = load(tmp_path, attn_implementation=name)
        assert asked.config._attn_implementation == name
        assert ("transformers' eager" in asked.explain()) == (name == "eager")


def test_meta_device_initialisation() -> None:
    theirs, _ = pair()
    with torch.device("meta"):
        ours: Any = fastgpt2.GPT2LMHeadModel(config())
    assert ours.lm_head.weight.is_meta and "ours" in ours.explain()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    ours.tie_weights()
    assert_close(ours.eval()(tokens()).logits, theirs(tokens()).logits)


def test_resized_embeddings() -> None:
    theirs, ours = pair()
    for model in (theirs, ours):
        torch.manual_seed(0)
        model.resize_token_embeddings(70, mean_resizing=False)
        model.transformer.wte.weight.data[61:] = 0.5
    assert ours.lm_head.weight is ours.transformer.wte.weight
    ids = tokens()
    ids[0, 0] = 69
    expected, got = (m(ids, labels=ids) for m in (theirs, ours))
    assert got.logits.shape[-1] == 70
    assert_close((got.logits, got.loss), (expected.logits, expected.loss))


def test_deepcopy_and_pickle() -> None:
    _, ours = pair()
    ids = tokens()
    expected = ours(ids).logits
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is fastgpt2.GPT2LMHeadModel
        assert copied.lm_head.weight is copied.transformer.wte.weight
        with torch.no_grad():
            ours.transformer.ln_f.bias.add_(1.0)
        assert torch.equal(copied(ids).logits, expected)
        with torch.no_grad():
            ours.transformer.ln_f.bias.sub_(1.0)


def test_threads_do_not_mix() -> None:
    _, ours = pair()
    batches = [tokens(2, 5 + i, seed=i) for i in range(4)]
    masks = [padding(5 + i, (i % 3, 5 + i), (0, 5 + i)) for i in range(4)]
    expected = [ours(b, attention_mask=m).logits for b, m in zip(batches, masks, strict=True)]
    failures: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            hidden = i % 2 == 0
            out = ours(batches[i], attention_mask=masks[i], output_hidden_states=hidden)
            if not torch.allclose(out.logits, expected[i]) or bool(out.hidden_states) != hidden:
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_row_of_padding_alone_is_finite() -> None:
    _, ours = pair()
    ids = tokens(2, 6)
    ids[1] = PAD
    assert ours(ids, attention_mask=padding(6, (0, 6), (0, 0))).logits.isfinite().all()
