"""LoRA on a ViT with a head in modules_to_save, after peft's image classification guide."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

torch.manual_seed(0)
model = ViTForImageClassification(
    ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=16,
        patch_size=4,
        num_labels=4,
    )
)
config = LoraConfig(
    r=4,
    lora_alpha=16,
    target_modules=["q_proj", "v_proj"],
    lora_dropout=0.1,
    bias="none",
    modules_to_save=["classifier"],
)
lora_model = get_peft_model(model, config)
lora_model.print_trainable_parameters()

dataset = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 4} for i in range(64)]
trainer = Trainer(
    lora_model,
    TrainingArguments(
        "vit-lora",
        remove_unused_columns=False,
        save_strategy="no",
        learning_rate=5e-3,
        per_device_train_batch_size=8,
        num_train_epochs=1,
        report_to="none",
        use_cpu=True,
        label_names=["labels"],
    ),
    train_dataset=dataset,
)
trainer.train()
lora_model.save_pretrained("vit-lora-adapter")
