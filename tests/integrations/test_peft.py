"""Parameters of ours inside a PEFT model train, are saved, come back, and are audited right."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import learnables as ln
from learnables.errors import CheckpointError, SelectionError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.colour = ln.parameter(torch.eye(4), weight_decay="init")
        self.q_proj = nn.Linear(4, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.q_proj(x @ self.colour)))


def wrapped(seed: int = 0) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(Net(), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=True))


def train(model: Any, steps: int = 3) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(ln.param_groups(model, lr=0.1, weight_decay=0.1))
    ln.attach(model, optimizer)
    for _ in range(steps):
        step(model, optimizer)
    return optimizer


def step(model: Any, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    loss = (model(torch.randn(16, 4)) - 1).square().mean()
    loss.backward()
    optimizer.step()
    return loss


def test_a_declared_parameter_trains_beside_the_adapter_and_comes_back(tmp_path: Path) -> None:
    from peft import PeftModel

    from learnables.integrations import peft as ours

    model = wrapped()
    assert not model.base_model.model.colour.requires_grad, "PEFT froze it"
    assert ours.train_declared(model) == ("base_model.model.colour",)
    optimizer = train(model)
    assert not torch.equal(model.base_model.model.colour.detach(), torch.eye(4))
    report = ln.audit(model, optimizer, lambda: step(model, optimizer))
    assert report.ok, report

    ours.save_pretrained(model, tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net(), tmp_path)
    assert ours.load_pretrained_(again, tmp_path) == ("base_model.model.colour",)
    x = torch.randn(3, 4)
    torch.testing.assert_close(again(x), model(x), rtol=0, atol=0)


def test_what_peft_forgets_is_found_by_the_audit_of_what_was_meant() -> None:
    model = wrapped()
    optimizer = train(model)
    meant = ln.Intent(trainable=("*colour",))
    report = ln.audit(model, optimizer, lambda: step(model, optimizer), intent=meant)
    assert any("base_model.model.colour" in f.where for f in report.findings if not report.ok)


def test_an_adapter_that_the_optimizer_lacks_is_named() -> None:
    model = wrapped()
    lora_a = [p for name, p in model.named_parameters() if "lora_A" in name]
    optimizer = torch.optim.SGD(lora_a, lr=0.1)
    report = ln.audit(model, optimizer, lambda: step(model, optimizer))
    named = {name for f in report.findings if f.code == "LRN201" for name in f.where}
    assert named == {"base_model.model.q_proj.lora_B.default.weight"}


def test_another_shape_and_a_model_without_declarations_are_refused(tmp_path: Path) -> None:
    from learnables.integrations import peft as ours

    model = wrapped()
    ours.train_declared(model)
    ours.save_pretrained(model, tmp_path)
    model.base_model.model.colour = nn.Parameter(torch.eye(5))
    with pytest.raises(CheckpointError, match="does not fit"):
        ours.load_pretrained_(model, tmp_path)
    with pytest.raises(SelectionError, match="declared"):
        ours.train_declared(nn.Linear(2, 2))


def test_in_a_trainer_a_prompt_of_ours_and_lora_train_together(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import Trainer, TrainingArguments

    from learnables.integrations import peft as ours
    from learnables.integrations.transformers import LearnablesCallback, optimizer_cls_and_kwargs

    def vit() -> Any:
        from transformers import ViTConfig, ViTForImageClassification

        torch.manual_seed(0)
        model = ViTForImageClassification(
            ViTConfig(
                hidden_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=48,
                image_size=16,
                patch_size=8,
                num_labels=3,
            )
        )
        embeddings = model.vit.embeddings
        embeddings.prompt = ln.parameter(1, 4, 24, init=ln.init.trunc_normal(0.02))
        embeddings.register_forward_hook(
            lambda module, _, x: torch.cat([x, module.prompt.expand(len(x), -1, -1)], dim=1)
        )
        return model

    lora = LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["classifier"])
    model = get_peft_model(vit(), lora)
    assert ours.train_declared(model) == ("base_model.model.vit.embeddings.prompt",)
    args = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
    )
    callback = LearnablesCallback(watch=0)
    data = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 3} for i in range(24)]
    Trainer(
        model,
        args,
        train_dataset=data,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(model, args),
        callbacks=[callback],
    ).train()
    assert callback.report is not None
    assert callback.report.ok, str(callback.report)
    assert {row.name for row in callback.report.parameters if row.name.endswith("prompt")}

    ours.save_pretrained(model, tmp_path / "adapter")
    again = PeftModel.from_pretrained(vit(), tmp_path / "adapter")
    assert ours.load_pretrained_(again, tmp_path / "adapter")
    x = torch.randn(2, 3, 16, 16)
    model.eval(), again.eval()
    torch.testing.assert_close(again(x).logits, model(x).logits, rtol=0, atol=0)


# --- grafts --------------------------------------------------------------------------------------

IDS = torch.arange(1, 15).view(2, 7)
QUERY = "model.layers.0.self_attn.q_proj"


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        vocab_size=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def with_lora(model: nn.Module) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))


def prompts() -> nn.Module:
    return ln.nn.Prompts(3, 48, init=ln.init.normal(1.0))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained(model: Any) -> None:
    """Three steps, each of which moves the prompts and every adapter; then the audit."""
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert sum("prompts" in name for name in before) == 1
    assert sum("lora_" in name for name in before) == 4
    optimizer = torch.optim.AdamW(ln.param_groups(model, lr=0.05, weight_decay=0.1))
    ln.attach(model, optimizer)
    model.train()

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        return loss

    for _ in range(3):
        step()
    report = ln.audit(model, optimizer, step)
    assert report.ok, report
    assert {row.name for row in report.parameters} >= set(before)
    still = {n for n, p in model.named_parameters() if n in before and torch.equal(p, before[n])}
    assert not still


def test_a_graft_that_was_there_before_peft_trains_beside_lora_and_comes_back(
    tmp_path: Path,
) -> None:
    from peft import PeftModel

    from learnables.integrations import peft as ours

    base = llama()
    ln.graft(base, "prompts", prompts())
    model = with_lora(base)
    assert not base.prompts.tokens.requires_grad, "PEFT froze it"
    assert ours.train_declared(model) == ("base_model.model.prompts.tokens",)
    trained(model)
    ours.save_pretrained(model, tmp_path)
    again = llama()
    ln.graft(again, "prompts", prompts())
    loaded = PeftModel.from_pretrained(again, tmp_path)
    assert ours.load_pretrained_(loaded, tmp_path) == ("base_model.model.prompts.tokens",)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("way", ["delta", "beside the adapter"])
def test_a_graft_in_a_peft_model_trains_beside_lora_and_comes_back(
    way: str, tmp_path: Path
) -> None:
    from peft import PeftModel

    from learnables.integrations import peft as ours

    model = with_lora(llama())
    handle = ln.graft(model, "prompts", prompts())
    assert handle.at == tuple(f"base_model.model.model.layers.{i}" for i in range(2))
    trained(model)
    if way == "delta":
        names = ln.save_delta(model, tmp_path / "delta")
        assert sum("lora_" in name for name in names) == 4
        assert (tmp_path / "delta").stat().st_size < 8192
        again = with_lora(llama())
        ln.load_delta(again, tmp_path / "delta")
    else:
        ours.save_pretrained(model, tmp_path)
        again = PeftModel.from_pretrained(llama(), tmp_path)
        ln.graft(again, "prompts", prompts())
        assert ours.load_pretrained_(again, tmp_path) == ("prompts.tokens",)
    assert torch.equal(logits(again), logits(model))
    told = {"max_new_tokens": 3, "do_sample": False}
    with torch.no_grad():
        cached = again.generate(input_ids=IDS, **told)
        assert torch.equal(cached, again.generate(input_ids=IDS, use_cache=False, **told))


@pytest.mark.parametrize("end", ["remove", "merge", "merge and unload"])
@pytest.mark.parametrize("first", ["delta", "lora"])
def test_a_delta_and_lora_on_one_weight_add_up_and_go_one_by_one(first: str, end: str) -> None:
    base = llama()
    plain, delta = logits(base), ln.nn.LowRankDelta(48, 48)
    nn.init.normal_(delta.up)
    if first == "delta":
        handle = ln.graft(base, "delta", delta, f"{QUERY}.weight")
        model = with_lora(base)
    else:
        model = with_lora(base)
        handle = ln.graft(base, "delta", delta, f"{QUERY}.base_layer.weight")
    lora = base.get_submodule(QUERY)
    nn.init.normal_(lora.lora_B["default"].weight)
    with torch.no_grad():
        adapter = lora.scaling["default"] * (
            lora.lora_B["default"].weight @ lora.lora_A["default"].weight
        )
        twin = llama()
        weight = twin.get_parameter(f"{QUERY}.weight")
        weight += adapter
        only_lora = logits(twin)
        weight += delta.up @ delta.down
        both = logits(twin)
    torch.testing.assert_close(logits(model), both)
    if end == "merge and unload":
        torch.testing.assert_close(logits(model.merge_and_unload()), both)
        return
    getattr(handle, end)()
    torch.testing.assert_close(logits(model), both if end == "merge" else only_lora)
    assert not hasattr(base, "delta")
    if end == "remove":
        assert torch.equal(logits(model.unload()), plain)


def test_a_folder_without_our_file_is_refused_with_what_writes_it(tmp_path: Path) -> None:
    from learnables.integrations import peft as ours

    model = wrapped()
    ours.train_declared(model)
    with pytest.raises(CheckpointError, match="nothing of ours lies beside") as error:
        ours.load_pretrained_(model, tmp_path / "adapter")
    exec(error.value.mend, {"model": model})
    assert ours.load_pretrained_(model, tmp_path / "adapter")
