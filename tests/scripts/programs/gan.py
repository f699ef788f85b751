"""A generator and a discriminator that take turns, each with its own optimizer."""

import torch
from torch import nn, optim

torch.manual_seed(0)
nz, ngf, batch_size = 8, 16, 32
real_label, fake_label = 1.0, 0.0


def weights_init(m):
    if isinstance(m, nn.Linear):
        nn.init.normal_(m.weight, 0.0, 0.2)
    elif isinstance(m, nn.BatchNorm1d):
        nn.init.normal_(m.weight, 1.0, 0.02)
        nn.init.zeros_(m.bias)


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.Linear(nz, ngf, bias=False), nn.BatchNorm1d(ngf), nn.ReLU(True), nn.Linear(ngf, 2)
        )

    def forward(self, input):
        return self.main(input)


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(
            nn.Linear(2, ngf), nn.LeakyReLU(0.2, inplace=True), nn.Linear(ngf, 1)
        )

    def forward(self, input):
        return self.main(input).squeeze(1)


netG = Generator()
netG.apply(weights_init)
netD = Discriminator()
netD.apply(weights_init)
criterion = nn.BCEWithLogitsLoss()
fixed_noise = torch.randn(batch_size, nz)
optimizerD = optim.Adam(netD.parameters(), lr=2e-3, betas=(0.5, 0.999))
optimizerG = optim.Adam(netG.parameters(), lr=2e-3, betas=(0.5, 0.999))

for i in range(8):
    # update D: maximise log(D(x)) + log(1 - D(G(z)))
    netD.zero_grad()
    real = torch.randn(batch_size, 2) * 0.3 + 1
    label = torch.full((batch_size,), real_label)
    errD_real = criterion(netD(real), label)
    errD_real.backward()
    noise = torch.randn(batch_size, nz)
    fake = netG(noise)
    label.fill_(fake_label)
    errD_fake = criterion(netD(fake.detach()), label)
    errD_fake.backward()
    optimizerD.step()

    # update G: maximise log(D(G(z)))
    netG.zero_grad()
    label.fill_(real_label)
    errG = criterion(netD(fake), label)
    errG.backward()
    optimizerG.step()
    print(i, f"{(errD_real + errD_fake).item():.4f} {errG.item():.4f}")
    if i % 4 == 0:
        with torch.no_grad():
            netG.eval()
            netG(fixed_noise)
            netG.train()
