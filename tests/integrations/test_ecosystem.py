"""What programs wrap round a model: Trainer, PEFT, pipelines, torch.compile, export, lm-eval."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import fastgpt2
from tests.integrations.tiny_hf import (
    PAD,
    assert_close,
    assert_gradient_close,
    config,
    padding,
    pair,
    randomised,
    tokens,
)

needs_hf_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="Hugging Face's accelerate is absent"
)


class Texts(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Eight rows, each padded on the right to nine tokens."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = tokens(1, 9, seed=i)[0]
        mask = padding(9, (0, 4 + i % 6))[0]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": ids.masked_fill(mask == 0, -100),
        }


def trained(model: Any, folder: Path, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=1e-2,
        report_to="none",
        save_steps=2,
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
        **options,
    )
    data = Texts()
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    return trainer


@needs_hf_accelerate
@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
def test_trainer_follows_theirs(tmp_path: Path, fused: bool) -> None:
    theirs, ours = pair()
    ours.fused_loss = fused
    trainers = [trained(m, tmp_path / n) for n, m in {"theirs": theirs, "ours": ours}.items()]
    history = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in trainers]
    assert history[1] == pytest.approx(history[0], abs=2e-3) and len(history[0]) == 4
    evaluated = [t.evaluate()["eval_loss"] for t in trainers]
    assert evaluated[1] == pytest.approx(evaluated[0], abs=2e-3)
    predicted = trainers[1].predict(Texts()).predictions
    assert (predicted[0] if isinstance(predicted, tuple) else predicted).shape == (8, 9, 61)
    again: Any = fastgpt2.GPT2LMHeadModel.from_pretrained(tmp_path / "ours" / "checkpoint-4")
    assert_close(again.eval()(tokens()).logits, ours.eval()(tokens()).logits)


@needs_hf_accelerate
def test_trainer_with_label_smoothing_and_checkpointing(tmp_path: Path) -> None:
    losses = []
    for name, model in zip(("theirs", "ours"), pair(), strict=True):
        if name == "ours":
            model.fused_loss = True
        trainer = trained(
            model, tmp_path / name, label_smoothing_factor=0.1, gradient_checkpointing=True
        )
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)


def test_peft_lora(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    theirs, ours = pair()
    adapters = peft.LoraConfig(
        r=2, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    outputs, models = [], []
    for base in (theirs, ours):
        torch.manual_seed(0)
        model = peft.get_peft_model(base, adapters)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.05)
        out = model(tokens(), labels=tokens())
        out.loss.backward()
        lora = [p.grad for n, p in model.named_parameters() if p.requires_grad]
        outputs.append((out.loss, out.logits, *lora))
        models.append(model)
        assert model.generate(input_ids=tokens(1, 4), max_new_tokens=3).shape[1] <= 7
    assert len(outputs[0]) == 2 + 2 * 2 * 4
    for got, expected in zip(outputs[1], outputs[0], strict=True):
        assert_close(got, expected)
    # adapters of the one load into the other, and merge
    models[0].save_pretrained(tmp_path)
    fresh = fastgpt2.GPT2LMHeadModel(config())
    fresh.load_state_dict(pair()[0].state_dict())
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert_close(loaded(tokens()).logits, outputs[0][1])
    merged = loaded.merge_and_unload()
    assert type(merged) is fastgpt2.GPT2LMHeadModel
    assert_close(merged(tokens()).logits, outputs[0][1])
    # and a model that has its adapters already can be accelerated
    before = models[0].eval()(tokens()).logits
    assert_close(fastgpt2.accelerate(models[0])(tokens()).logits, before)
    assert type(models[0].base_model.model) is fastgpt2.GPT2LMHeadModel


def test_prompt_tuning_and_prefix_tuning() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    for tuning in (peft.PromptTuningConfig, peft.PrefixTuningConfig):
        logits = []
        for base in pair():
            torch.manual_seed(0)
            model = peft.get_peft_model(base, tuning(num_virtual_tokens=3, task_type="CAUSAL_LM"))
            mask = padding(9, (0, 9), (0, 5), (0, 9))
            logits.append(model.eval()(tokens(), attention_mask=mask).logits)
        assert_close(logits[1], logits[0])


@pytest.fixture
def tokenizer() -> Any:
    """Words w0 .. w59, so that text and ids convert into each other without a file."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(60)} | {"<pad>": PAD}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made: Any = transformers.PreTrainedTokenizerFast
    return made(tokenizer_object=inner, eos_token="w0", pad_token="<pad>", padding_side="left")


def test_pipelines(tokenizer: Any) -> None:
    theirs, ours = pair()
    prompts = ["w1 w2 w3", "w4"]
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "batch_size": 2}
    texts = [
        transformers.pipeline("text-generation", model=m, tokenizer=tokenizer)(prompts, **options)
        for m in (theirs, ours)
    ]
    assert texts[1] == texts[0]
    classifier = randomised(transformers.GPT2ForSequenceClassification(config(num_labels=3)))
    classify = transformers.pipeline("text-classification", model=classifier, tokenizer=tokenizer)
    before = classify(prompts)
    fastgpt2.accelerate(classifier)
    for got, expected in zip(classify(prompts), before, strict=True):
        assert got["label"] == expected["label"]
        assert got["score"] == pytest.approx(expected["score"], abs=1e-5)


@pytest.fixture
def compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("fused", [False, True], ids=["logits", "fused"])
def test_compiles_into_one_graph_forward_and_backward(fused: bool) -> None:
    theirs, ours = pair(n_layer=1)
    ours.fused_loss = fused
    theirs.train(), ours.train()
    # aot_eager traces and differentiates as inductor's front does, without a C++ compiler
    compiled: Any = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for T in (9, 12):
        inputs = {"input_ids": tokens(3, T), "labels": tokens(3, T)}
        for model in (theirs, ours):
            model.zero_grad()
        expected, got = theirs(**inputs), compiled(**inputs)
        expected.loss.backward()
        got.loss.backward()
        assert_close(got.loss, expected.loss)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert_gradient_close(a.grad, b.grad)


@pytest.mark.usefixtures("compiler")
def test_compiled_attention_is_causal_where_theirs_is_and_right_with_a_mask() -> None:
    causal: dict[str, list[bool]] = {}
    mask = padding(9, (2, 9), (0, 9), (0, 9))
    ids, kept = tokens(), mask.bool()
    for name, model in zip(("theirs", "ours"), pair(n_layer=1), strict=True):
        flags = causal.setdefault(name, [])

        def look(graph: torch.fx.GraphModule, _inputs: Any, flags: list[bool] = flags) -> Any:
            flags.append(any(node.kwargs.get("is_causal") is True for node in graph.graph.nodes))
            return graph.forward

        compiled: Any = torch.compile(model, fullgraph=True, backend=look)
        assert_close(compiled(ids).logits, model(ids).logits)
        expected = model(ids, attention_mask=mask).logits[kept]
        assert_close(compiled(ids, attention_mask=mask).logits[kept], expected)
    # without a mask it is causal, from the release of transformers on that can skip it there
    assert causal["ours"] == causal["theirs"] and not causal["ours"][1]


def test_export() -> None:
    _, ours = pair()
    ids = tokens()
    program = torch.export.export(ours, (), {"input_ids": ids, "use_cache": False}, strict=False)
    got = program.module()(input_ids=ids, use_cache=False)
    assert_close(got.logits, ours(ids).logits)


def test_lm_eval_gives_the_same_log_likelihoods(tokenizer: Any) -> None:
    huggingface = pytest.importorskip(
        "lm_eval.models.huggingface", reason="lm_eval is not installed"
    )
    Instance = pytest.importorskip("lm_eval.api.instance").Instance
    theirs, ours = pair()
    pairs = [("w1 w2 w3", " w4"), ("w5", " w6 w7 w8"), ("", "w9 w1"), ("w3 w3", " w3")]
    rolling = ["w1 w2 w3 w4 w5 w6", " ".join(f"w{i % 60}" for i in range(100))]
    results = []
    for model in (theirs, ours):
        lm = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
        asked = [Instance("loglikelihood", {}, p, i) for i, p in enumerate(pairs)]
        rolled = [Instance("loglikelihood_rolling", {}, (t,), i) for i, t in enumerate(rolling)]
        likelihoods = lm.loglikelihood(asked, disable_tqdm=True)
        results.append((likelihoods, lm.loglikelihood_rolling(rolled, disable_tqdm=True)))
    (theirs_pairs, theirs_rolled), (ours_pairs, ours_rolled) = results
    assert [greedy for _, greedy in ours_pairs] == [greedy for _, greedy in theirs_pairs]
    assert [x for x, _ in ours_pairs] == pytest.approx([x for x, _ in theirs_pairs], abs=1e-4)
    assert ours_rolled == pytest.approx(theirs_rolled, abs=1e-3)
