"""LoRA on a causal language model in a plain loop, after peft's quick tour."""

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, get_linear_schedule_with_warmup

torch.manual_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=64,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
)
peft_config = LoraConfig(
    task_type=TaskType.CAUSAL_LM,
    inference_mode=False,
    r=8,
    lora_alpha=32,
    lora_dropout=0.1,
    fan_in_fan_out=True,
)
model = get_peft_model(model, peft_config)
model.print_trainable_parameters()

lr, num_epochs = 1e-3, 2
ids = torch.randint(0, 64, (64, 24))
train_dataloader = torch.utils.data.DataLoader(ids, batch_size=16, shuffle=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
lr_scheduler = get_linear_schedule_with_warmup(optimizer, 0, len(train_dataloader) * num_epochs)
for epoch in range(num_epochs):
    model.train()
    total_loss = 0
    for step, batch in enumerate(train_dataloader):
        outputs = model(input_ids=batch, labels=batch)
        loss = outputs.loss
        total_loss += loss.detach().float()
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
    print(f"{epoch=}: {total_loss / len(train_dataloader)}")
