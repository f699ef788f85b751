"""torch.compile around a timm model in a plain loop under autocast."""

import timm
import torch
import torch.nn.functional as F

torch.manual_seed(0)


class ColourJitterHead(torch.nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.colour = torch.nn.Parameter(torch.eye(3))
        self.backbone = backbone

    def forward(self, x):
        x = torch.einsum("oc,bchw->bohw", self.colour, x)
        return self.backbone(x)


backbone = timm.create_model(
    "vit_tiny_patch16_224",
    img_size=32,
    patch_size=8,
    depth=2,
    embed_dim=48,
    num_heads=3,
    num_classes=10,
)
model = torch.compile(ColourJitterHead(backbone), backend="aot_eager")
opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
for it in range(8):
    x, y = torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    opt.zero_grad(set_to_none=True)
    loss.backward()
    opt.step()
    print(it, loss.item())
