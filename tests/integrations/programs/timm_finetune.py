"""Fine-tuning a timm model with a new head and layer-wise learning-rate decay."""

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler

torch.manual_seed(0)
model = timm.create_model(
    "vit_tiny_patch16_224",
    img_size=32,
    patch_size=8,
    depth=4,
    embed_dim=48,
    num_heads=3,
    num_classes=1000,
)
model.reset_classifier(num_classes=5)
optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-4, weight_decay=0.05, layer_decay=0.75)
scheduler = CosineLRScheduler(optimizer, t_initial=10, lr_min=1e-6, warmup_t=2, warmup_lr_init=1e-5)
criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)

x, y = torch.randn(160, 3, 32, 32), torch.randint(0, 5, (160,))
loader = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(x, y), batch_size=16, shuffle=True
)
for epoch in range(2):
    model.train()
    scheduler.step(epoch)
    for inputs, targets in loader:
        outputs = model(inputs)
        loss = criterion(outputs, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.inference_mode():
        accuracy = (model(x[:64]).argmax(-1) == y[:64]).float().mean()
    print(f"epoch {epoch} loss {loss.item():.3f} accuracy {accuracy:.3f}")
