"""A PreTrainedModel of one's own with parameters of one's own, trained by the Trainer."""

import torch
from torch import nn
from transformers import BertConfig, BertModel, BertPreTrainedModel, Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput


class BertWithMixing(BertPreTrainedModel):
    """ELMo's scalar mix over all layers, then a classifier."""

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)
        self.layer_weights = nn.Parameter(torch.zeros(config.num_hidden_layers + 1))
        self.gamma = nn.Parameter(torch.ones(1))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        outputs = self.bert(input_ids, attention_mask=attention_mask, output_hidden_states=True)
        states = torch.stack(outputs.hidden_states)
        mix = torch.softmax(self.layer_weights, 0)
        pooled = self.gamma * torch.einsum("l,lbtd->bd", mix, states) / states.shape[2]
        logits = self.classifier(self.dropout(pooled))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


torch.manual_seed(0)
config = BertConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=16,
    num_labels=3,
)
model = BertWithMixing(config)
data = [
    {
        "input_ids": torch.randint(1, 50, (12,)),
        "attention_mask": torch.ones(12, dtype=torch.long),
        "labels": i % 3,
    }
    for i in range(96)
]
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="mix",
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    ),
    train_dataset=data,
)
trainer.train()
print("layer weights", model.layer_weights.tolist())
