"""The four lines of Accelerate's quick tour in a plain loop, with gathered metrics."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, get_linear_schedule_with_warmup


def get_dataloaders(batch_size):
    ids = torch.randint(5, 100, (256, 12))
    labels = (ids[:, 0] > 52).long()
    train, val = TensorDataset(ids[:192], labels[:192]), TensorDataset(ids[192:], labels[192:])
    return DataLoader(train, batch_size, shuffle=True), DataLoader(val, batch_size)


def training_function(config):
    accelerator = Accelerator(cpu=True)
    set_seed(config["seed"])
    train_dataloader, eval_dataloader = get_dataloaders(config["batch_size"])
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=100,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=16,
        )
    )
    optimizer = AdamW(params=model.parameters(), lr=config["lr"])
    lr_scheduler = get_linear_schedule_with_warmup(
        optimizer=optimizer,
        num_warmup_steps=2,
        num_training_steps=len(train_dataloader) * config["num_epochs"],
    )
    model, optimizer, train_dataloader, eval_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader, lr_scheduler
    )
    for epoch in range(config["num_epochs"]):
        model.train()
        for step, (input_ids, labels) in enumerate(train_dataloader):
            outputs = model(input_ids=input_ids, labels=labels)
            loss = outputs.loss
            accelerator.backward(loss)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()

        model.eval()
        right = 0
        for input_ids, labels in eval_dataloader:
            with torch.no_grad():
                outputs = model(input_ids=input_ids)
            predictions = outputs.logits.argmax(dim=-1)
            predictions, references = accelerator.gather_for_metrics((predictions, labels))
            right += int((predictions == references).sum())
        accelerator.print(f"epoch {epoch}:", right / 64)
    accelerator.end_training()


if __name__ == "__main__":
    training_function({"lr": 1e-3, "num_epochs": 1, "seed": 42, "batch_size": 16})
