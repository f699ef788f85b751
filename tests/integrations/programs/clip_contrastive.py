"""Image and text towers trained against each other, with CLIP's logit scale, from a fresh CLIPModel."""

import torch
from transformers import CLIPConfig, CLIPModel

torch.manual_seed(0)
small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
model = CLIPModel(
    CLIPConfig(
        text_config={**small, "vocab_size": 100, "max_position_embeddings": 16, "eos_token_id": 99},
        vision_config={**small, "image_size": 16, "patch_size": 4},
        projection_dim=24,
    )
)
no_decay = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
decay = [p for n, p in model.named_parameters() if not (p.ndim < 2 or "embed" in n)]
optimizer = torch.optim.AdamW(
    [{"params": no_decay, "weight_decay": 0.0}, {"params": decay, "weight_decay": 0.2}],
    lr=5e-4,
    eps=1e-6,
)
for step in range(8):
    images = torch.randn(12, 3, 16, 16)
    captions = torch.randint(0, 99, (12, 10))
    captions[:, -1] = 99
    out = model(input_ids=captions, pixel_values=images, return_loss=True)
    optimizer.zero_grad()
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, 4.6052)
    print(step, out.loss.item())
