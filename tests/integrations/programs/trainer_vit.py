"""Image classification with transformers' Trainer, as in its task guide, with a small fresh ViT."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

torch.manual_seed(0)


class Digits(Dataset):
    def __init__(self, start, stop):
        digits = load_digits()
        self.images = torch.tensor(digits.images[start:stop], dtype=torch.float32)[:, None] / 16
        self.labels = torch.tensor(digits.target[start:stop])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def compute_metrics(eval_pred):
    predictions, labels = eval_pred
    return {"accuracy": float((np.argmax(predictions, axis=1) == labels).mean())}


config = ViTConfig(
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=96,
    image_size=8,
    patch_size=2,
    num_channels=1,
    num_labels=10,
)
model = ViTForImageClassification(config)

training_args = TrainingArguments(
    output_dir="my_model",
    remove_unused_columns=False,
    eval_strategy="epoch",
    save_strategy="no",
    learning_rate=5e-5,
    per_device_train_batch_size=16,
    gradient_accumulation_steps=2,
    per_device_eval_batch_size=64,
    num_train_epochs=1,
    warmup_steps=2,
    logging_steps=10,
    report_to="none",
    use_cpu=True,
)
trainer = Trainer(
    model=model,
    args=training_args,
    train_dataset=Digits(0, 320),
    eval_dataset=Digits(320, 400),
    compute_metrics=compute_metrics,
)
trainer.train()
print(trainer.evaluate())
