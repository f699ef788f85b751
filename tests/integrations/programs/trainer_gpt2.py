"""A language model from scratch with a Trainer whose loss is customised, as the guides show it."""

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

text = "the quick brown fox jumps over the lazy dog and the dog sleeps on " * 60
chars = sorted(set(text))
ids = torch.tensor([chars.index(c) for c in text])
block = 32
examples = [
    {"input_ids": ids[i : i + block], "labels": ids[i : i + block]} for i in range(0, 2400, 8)
]

torch.manual_seed(0)
config = GPT2Config(
    vocab_size=len(chars),
    n_positions=block,
    n_embd=32,
    n_layer=2,
    n_head=2,
    bos_token_id=0,
    eos_token_id=0,
)


class CustomTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs.get("logits")
        loss_fct = nn.CrossEntropyLoss(label_smoothing=0.1)
        loss = loss_fct(logits[:, :-1].reshape(-1, logits.size(-1)), labels[:, 1:].reshape(-1))
        return (loss, outputs) if return_outputs else loss


trainer = CustomTrainer(
    model=GPT2LMHeadModel(config),
    args=TrainingArguments(
        output_dir="gpt2",
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=3e-4,
        weight_decay=0.1,
        adam_beta2=0.95,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=True,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    ),
    train_dataset=examples,
)
print(trainer.train().training_loss)
