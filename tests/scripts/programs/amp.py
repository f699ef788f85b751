"""Mixed precision with a gradient scaler and clipping, as in the AMP examples of PyTorch."""

import torch
from torch import nn

torch.manual_seed(0)
device = "cpu"
use_amp = True
batch_size, in_size, out_size, num_layers = 32, 64, 8, 3


def make_model(in_size, out_size, num_layers):
    layers = []
    for _ in range(num_layers - 1):
        layers += [nn.Linear(in_size, in_size), nn.ReLU()]
    layers.append(nn.Linear(in_size, out_size))
    return nn.Sequential(*layers).to(device)


data = [torch.randn(batch_size, in_size, device=device) for _ in range(8)]
targets = [torch.randn(batch_size, out_size, device=device) for _ in range(8)]
loss_fn = nn.MSELoss().to(device)

net = make_model(in_size, out_size, num_layers)
opt = torch.optim.SGD(net.parameters(), lr=0.01)
scaler = torch.amp.GradScaler(device, enabled=use_amp)

for epoch in range(2):
    for input, target in zip(data, targets, strict=True):
        with torch.autocast(device_type=device, dtype=torch.float16, enabled=use_amp):
            output = net(input)
            loss = loss_fn(output, target)
        scaler.scale(loss).backward()
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(net.parameters(), max_norm=0.1)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
    print(epoch, loss.item())
