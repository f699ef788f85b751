"""Optimizers that step inside the backward pass, after torch's memory-saving tutorial, on a torchvision ViT."""

import torch
from torchvision import models

torch.manual_seed(0)
model = models.VisionTransformer(
    image_size=16, patch_size=4, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=6
)
torch.nn.init.normal_(model.heads.head.weight, std=0.02)
optimizer_dict = {p: torch.optim.Adam([p], foreach=False) for p in model.parameters()}


def optimizer_hook(parameter) -> None:
    optimizer_dict[parameter].step()
    optimizer_dict[parameter].zero_grad()


for p in model.parameters():
    p.register_post_accumulate_grad_hook(optimizer_hook)

for i in range(8):
    fake_image = torch.rand(8, 3, 16, 16)
    loss = torch.nn.functional.cross_entropy(model(fake_image), torch.randint(0, 6, (8,)))
    loss.backward()
    print(i, loss.item())
